"""Ranks compare checksums of weights that they have in common."""

from collections.abc import Mapping

from torch import nn

from fgtp_pass.agreement.meeting import Meeting
from fgtp_pass.agreement.message import Intent
from fgtp_pass.errors import AgreementError
from fgtp_pass.weights.checksum import checksum
from fgtp_pass.weights.sharded_parameter import ShardedParameter

_SHOWN = 5  # weights in an error
_SAMPLE = 2**20  # bytes


def require_equal_sums(control: Meeting, sums: Mapping[str, str]) -> None:
    """Raise AgreementError on all ranks where two of them have different sums of one thing.

    sums: checksums by what they are of; a rank may have some that others have not.
    """
    said: dict[str, dict[int, str]] = {}
    for message in control.exchange(Intent.LOAD, payload=dict(sums)):
        for what, value in message.payload.items():
            said.setdefault(what, {})[message.rank] = value
    different = [what for what, by_rank in said.items() if len(set(by_rank.values())) > 1]
    if not different:
        return
    shown = []
    for what in different[:_SHOWN]:
        ranks: dict[str, list[int]] = {}
        for rank, value in said[what].items():
            ranks.setdefault(value, []).append(rank)
        listed = " but ".join(f"{value} on ranks {which}" for value, which in ranks.items())
        shown.append(f"{what} has checksum {listed}")
    raise AgreementError(
        f"the ranks have different data for {len(different)} weights: {'; '.join(shown)}. They "
        "must all be given the same weights."
    )


def sampled_sums(model: nn.Module) -> dict[str, str]:
    """Checksums of the start of each weight that is whole: enough to tell checkpoints apart."""
    return {
        name: checksum(value.detach().flatten()[: _SAMPLE // value.itemsize])
        for name, value in model.named_parameters()
        if not isinstance(value, ShardedParameter)
    }

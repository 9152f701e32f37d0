"""`update_weights`: new values for the weights of a running model, on all ranks or on none."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from fgtp_pass.agreement.control_group import all_ranks, reporting_failure
from fgtp_pass.agreement.meeting import Meeting
from fgtp_pass.backend.backend import data_parallel_of
from fgtp_pass.checkpoint.exchange import checked_source, exchange
from fgtp_pass.checkpoint.files import open_checkpoint
from fgtp_pass.checkpoint.names import Found, check_like, match_names, tensor_names
from fgtp_pass.checkpoint.same_weights import require_equal_sums
from fgtp_pass.checkpoint.sources import BroadcastSource, TensorSource
from fgtp_pass.collectives.groups import DataParallelGroup
from fgtp_pass.errors import AgreementError, CheckpointError
from fgtp_pass.hints import nearest_hint
from fgtp_pass.weights import packing
from fgtp_pass.weights.checksum import checksum
from fgtp_pass.weights.sharded_parameter import record_of
from fgtp_pass.weights.state import original_module
from fgtp_pass.weights.unread_parameter import WeightSource, source_of

Weights = Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]] | str | Path


def update_weights(
    model: nn.Module,
    weights: Weights | None,
    *,
    source: Literal["local", "rank0"] = "local",
    process_group: Any = None,
) -> None:
    """Put new values into a model's weights, in place; of full tensors each rank keeps its part.

    weights: full tensors by name in the model, one after the other (a generator can make them one
    by one; a DTensor is put together); or the path of a checkpoint, saved in whatever layout.
    Weights that are not among them stay. source: "local", all ranks give the same; "rank0", rank 0
    gives them and sends each part to those who keep it, and the others give None. process_group:
    as in the backend's options.

    Collective, and atomic: the new parts lie beside the old ones until all ranks have theirs, and
    equal checksums of what they have in common. So it takes memory for the parts of what is given;
    where that is too much, update in several calls. Raises CheckpointError on the rank that has a
    reason and AgreementError on the others; the old weights are then in force on all.
    """
    model = original_module(model)
    group = data_parallel_of({"process_group": process_group})
    control = all_ranks(group) if group is not None else None
    staged = _Staged(model)
    with reporting_failure(control), torch.inference_mode(False), torch.no_grad():
        sender = group if checked_source(source) == "rank0" else None
        gives = sender is None or sender.rank == 0
        offered = _offered(model, weights) if gives else iter(())
        for name, found in _in_step(control, offered, sender is not None):
            staged.add(name, found, sender)
    if control is not None:
        require_equal_sums(control, staged.sums)
    staged.put_in_force()
    exchange(control, "in force")  # so that no rank runs a step before all have them


def _offered(model: nn.Module, weights: Weights | None) -> Iterator[tuple[str, Found]]:
    """What is to be updated, one after the other."""
    if isinstance(weights, (str, Path)):
        names = tensor_names(model)
        for value, found in match_names(model, open_checkpoint(Path(weights))).items():
            yield names[value][0], found
        return
    for name, tensor in weights.items() if isinstance(weights, Mapping) else weights or ():
        yield name, Found(tensor)


def _in_step(
    control: Meeting | None, offered: Iterator[tuple[str, Found]], from_rank0: bool
) -> Iterator[tuple[str, Found | None]]:
    """The same names on all ranks, each when all have come to it, with what this rank offers.

    Without this, a rank that fails or has another order would leave others in a collective.
    """
    while True:
        name, found = next(offered, ("", None))
        head = (name, tuple(found.tensor.shape), found.tensor.dtype) if found is not None else None
        heads = exchange(control, head)
        if not from_rank0 and any(other != head for other in heads):
            listed = [" ".join(map(str, head)) if head else "none more" for head in heads]
            raise AgreementError(
                "the ranks do not update the same weights in the same order: "
                + ", ".join(f"rank {rank} {what}" for rank, what in enumerate(listed))
            )
        if heads[0] is None:
            return
        yield heads[0][0], found


class _Staged:
    """New data beside the old ones. sums: checksums of this rank's new parts, by what they are."""

    def __init__(self, model: nn.Module):
        self.sums: dict[str, str] = {}
        self._parts: dict[torch.Tensor, torch.Tensor] = {}
        self._names = tensor_names(model)
        self._values = {name: v for v, names in self._names.items() for name in names}

    def add(self, name: str, found: Found | None, sender: DataParallelGroup | None) -> None:
        """Take this rank's part of `found`, or receive it from `sender`."""
        value = self._values.get(name)
        if value is None:
            raise CheckpointError(
                f"the model has no weight {name!r} to update.{nearest_hint(name, self._values)}"
            )
        if source_of(value) is not None:
            raise CheckpointError(f"{name} was never read, so it cannot be updated.")
        local = None
        if found is not None:
            check_like(name, found.tensor, value)
            local = TensorSource(name, value.dtype, value.device, _in_full(found))
        origin: WeightSource | None = local
        if sender is not None:
            origin = BroadcastSource(name, value.dtype, value.device, value.shape, sender, local)
        assert origin is not None
        record, what = record_of(value), self._names[value][0]
        if record is None:
            part = origin.whole()
        else:
            size, rank = record.group.size, record.group.rank
            part = origin.shard(record.cut, size, rank)
            what += f" (part {rank} of {size})"
        found_sum = checksum(part)
        if self.sums.setdefault(what, found_sum) != found_sum:
            raise CheckpointError(
                f"{name} was given twice, if not by this name then as a weight that it is tied to "
                f"({', '.join(self._names[value])}), and the new data differ."
            )
        if record is not None and packing.is_packed(record.shard):
            packing.pack(part)
        self._parts[value] = part

    def put_in_force(self) -> None:
        """Overwrite the old data where they lie, since compiled graphs and idle steps hold them."""
        for value, part in self._parts.items():
            record = record_of(value)
            held = value.data if record is None else record.shard
            with torch.inference_mode(value.is_inference()), torch.no_grad():
                packing.overwrite(held, part)


def _in_full(found: Found) -> Found:
    """With a DTensor put together, which is collective over its mesh."""
    if isinstance(found.tensor, DTensor):
        return Found(found.tensor.full_tensor())
    return found

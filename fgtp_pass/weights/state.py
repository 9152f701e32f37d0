"""A sharded model as its user handles it: its plan, its checkpoints, and whole again."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from fgtp_pass.agreement.control_group import ONE_AT_A_TIME
from fgtp_pass.agreement.message import Intent
from fgtp_pass.errors import AgreementError
from fgtp_pass.plan.plan import Plan, merge
from fgtp_pass.weights import packing
from fgtp_pass.weights.shard import gather_full, unshard_parameter
from fgtp_pass.weights.sharded_parameter import ShardedParameter, record_of


def original_module(model: nn.Module) -> nn.Module:
    """The module that `torch.compile` wrapped, or the module itself."""
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, nn.Module) else model


def sharded_parameters(model: nn.Module) -> dict[str, ShardedParameter]:
    """The sharded parameters by name, in the model's order, a tied one once."""
    return {
        name: parameter
        for name, parameter in original_module(model).named_parameters()
        if isinstance(parameter, ShardedParameter)
    }


def applied_plan(model: nn.Module) -> Plan | None:
    """The plan that is in force on the model's weights, or None."""
    plans: dict[int, tuple[Plan, set[str]]] = {}
    for name, parameter in sharded_parameters(model).items():
        record = parameter._fgtp_record
        _, prefixes = plans.setdefault(id(record.plan), (record.plan, set()))
        prefixes.add(name.removesuffix(record.cut.fqn) if name.endswith(record.cut.fqn) else "")
    # Where Dynamo breaks a model up, it names parameters relative to the module of each frame.
    return merge(
        plan.with_prefix(prefixes.pop() if len(prefixes) == 1 else "")
        for plan, prefixes in plans.values()
    )


def unshard(model: nn.Module) -> None:
    """Give every rank its full weights back, bit for bit.

    Collective: every rank of the data-parallel group calls it. The next call of the compiled
    model shards again.
    """
    with _together(model):
        for parameter in sharded_parameters(model).values():
            unshard_parameter(parameter)


def full_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """A normal checkpoint with full tensors, on every rank. Collective.

    Tied entries share one tensor, as in `state_dict`. Unsharded entries are not copied.
    """
    with _together(model):
        return _state_dict(model, gather_full)


@contextmanager
def _together(model: nn.Module) -> Iterator[None]:
    """Meet with the ranks that hold the rest of this model's weights, then gather these in step.

    Raises AgreementError on all of them if one does something else, does not come, or fails.
    """
    records = {n: p._fgtp_record for n, p in sharded_parameters(model).items()}
    with ONE_AT_A_TIME, ExitStack() as stack:
        for control in dict.fromkeys(record.control for record in records.values()):
            names = [n for n, record in records.items() if record.control == control]
            said = {m.payload for m in control.exchange(Intent.GATHER, tuple(names))}
            if len(said) > 1:
                raise AgreementError(
                    "the ranks of a group want different weights put together: they must call "
                    "unshard or full_state_dict with the same model."
                )
            stack.enter_context(control.running([f"the gathering of {n}" for n in names]))
        yield


def shard_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """This rank's part: shards of what is sharded, everything else as it is. Not collective.

    Shards that are packed come as plain copies.
    """
    return _state_dict(model, lambda record: packing.plain(record.shard))


def _state_dict(model: nn.Module, read: Any) -> dict[str, torch.Tensor]:
    seen: dict[int, torch.Tensor] = {}
    entries: dict[str, torch.Tensor] = {}
    for name, value in original_module(model).state_dict(keep_vars=True).items():
        record = record_of(value)
        if record is not None and id(value) not in seen:
            seen[id(value)] = read(record)
        entries[name] = seen[id(value)] if record is not None else value.detach()
    return entries

"""weights: the only place that turns full parameters into shards and back.

A cut parameter stays an object of the model with all its metadata, because Dynamo's guards check
that; its memory is freed, and reading it raises.
"""

import ctypes
import math
import sys
from collections.abc import Iterable, Mapping, Set
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from fgtp_pass import dynamo
from fgtp_pass.agreement.control_group import ControlGroup
from fgtp_pass.collectives.groups import ComponentGroup
from fgtp_pass.plan.plan import Plan, WeightCut
from fgtp_pass.weights import packing
from fgtp_pass.weights.cut import cut_local, gather_weight
from fgtp_pass.weights.sharded_parameter import (
    ShardedParameter,
    ShardRecord,
    make_plain,
    refuse_half_done_changes,
)
from fgtp_pass.weights.unread_parameter import (
    UnreadParameter,
    WeightSource,
    read_whole,
    source_of,
)


def shard_parameters(
    parameters: Mapping[nn.Parameter, tuple[WeightCut, ComponentGroup] | None],
    plan: Plan,
    packed: Set[nn.Parameter],
    control: ControlGroup | None,
) -> int:
    """Replace the data of each parameter by this rank's shard and free the rest.

    None in place of a cut: the parameter stays whole. One that is unread is read, as a shard or
    whole. packed: those whose shards are packed. control: the ranks that will put the shards
    together again, None if nothing is cut. Returns how many were not sharded before.

    Idempotent: a parameter that is sharded already is left as it is. Peak memory is the full
    model plus one weight, since one parameter is freed before the next is cut; where they are
    unread, what the rank keeps plus one shard.
    """
    todo = {
        p: how
        for p, how in parameters.items()
        if not isinstance(p, ShardedParameter) and (how or isinstance(p, UnreadParameter))
    }
    if not todo:
        return 0
    refuse_half_done_changes()
    reads = any(isinstance(parameter, UnreadParameter) for parameter in todo)
    progress = tqdm(
        desc="reading weights" if reads else "sharding weights",
        total=sum(_kept_bytes(p, how) for p, how in todo.items()),
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        disable=None,
        leave=False,
    )
    with progress, torch.inference_mode(False), torch.no_grad():
        for parameter, how in todo.items():
            if isinstance(parameter, UnreadParameter) and how is None:
                read_whole(parameter)
            elif how is not None:
                assert control is not None
                shard = _part_of(parameter, *how)
                _replace(parameter, ShardRecord(shard, *how, plan, control))
                if parameter in packed:  # now that the full one is freed
                    packing.pack(shard)
            if parameter.device.type == "cpu":
                _return_freed_memory()
            progress.update(_kept_bytes(parameter, how))
    return sum(how is not None for how in todo.values())


def read_parameters(values: Iterable[object]) -> None:
    """Read those of the values that are unread parameters, each as a whole."""
    unread = [value for value in values if isinstance(value, UnreadParameter)]
    shard_parameters(dict.fromkeys(unread), Plan(data_parallel_size=1), frozenset(), None)


def _kept_bytes(parameter: nn.Parameter, how: tuple[WeightCut, ComponentGroup] | None) -> int:
    shape = how[0].shard_shape(how[1].size) if how else parameter.shape
    return math.prod(shape) * parameter.dtype.itemsize


def _part_of(parameter: nn.Parameter, cut: WeightCut, group: ComponentGroup) -> torch.Tensor:
    source = source_of(parameter)
    if source is not None:
        return source.shard(cut, group.size, group.rank)
    return cut_local(parameter.data, cut, group.size, group.rank)


def _replace(parameter: nn.Parameter, record: ShardRecord) -> None:
    if isinstance(parameter, UnreadParameter):  # it has no memory yet
        del parameter._fgtp_source
    else:
        full = parameter.data
        # Equal metadata, no memory. The old storage goes when its last user lets go of it, which
        # is right for memory-mapped checkpoints and for storages that parameters share.
        hollow = torch.empty_strided(
            full.shape, full.stride(), dtype=full.dtype, device=full.device
        )
        hollow.untyped_storage().resize_(0)
        parameter.data = hollow
    dynamo.refuse_data_pointer(parameter.data)
    parameter._fgtp_record = record  # type: ignore[attr-defined]
    parameter.__class__ = ShardedParameter


def forget_shard(parameter: nn.Parameter, source: WeightSource) -> None:
    """Let a parameter be unread again that was read in shards."""
    if isinstance(parameter, ShardedParameter):
        del parameter._fgtp_record
        parameter._fgtp_source = source  # type: ignore[attr-defined]
        parameter.__class__ = UnreadParameter  # type: ignore[assignment]


def _return_freed_memory() -> None:
    """Give freed pages back to the system: glibc keeps those in the middle of its heap."""
    if sys.platform.startswith("linux"):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _run(target: Any, *args: Any, **kwargs: Any) -> Any:
    return target(*args, **kwargs)


def gather_full(record: ShardRecord) -> torch.Tensor:
    """The full parameter, on every rank of the group. Collective."""
    with torch.inference_mode(False), torch.no_grad():
        shard = packing.plain(record.shard)
        whole: torch.Tensor = gather_weight(_run, record.group, record.cut, shard)
        return whole.contiguous()


def unshard_parameter(parameter: ShardedParameter) -> None:
    """Give the parameter its data back, bit for bit, with the strides it had. Collective."""
    whole = gather_full(parameter._fgtp_record)
    del parameter._fgtp_record
    make_plain(parameter, whole)

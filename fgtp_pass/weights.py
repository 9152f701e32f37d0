"""weights: the only place that turns full parameters into shards and back.

A cut parameter stays an object of the model with all its metadata, because Dynamo's guards check
that; its memory is freed, and reading it raises.
"""

import ctypes
import sys
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from fgtp_pass import packing
from fgtp_pass.collectives import ComponentGroup
from fgtp_pass.errors import ShardedWeightError
from fgtp_pass.plan import Plan, WeightCut, merge
from fgtp_pass.shards import cut_local, gather_weight


@dataclass(eq=False)
class ShardRecord:
    """What a sharded parameter carries.

    shard: this rank's part, contiguous, padded with zeros; packed or plain (`packing`). cut, group:
    how to get the rest. plan: the plan that cut it.
    """

    shard: torch.Tensor
    cut: WeightCut
    group: ComponentGroup
    plan: Plan

    def for_graph(self, takes_packed: bool) -> torch.Tensor:
        """The shard, to call a graph with; one that cannot take it packed unpacks it for good."""
        if not takes_packed:
            packing.unpack(self.shard)
        return self.shard


def _metadata_reads() -> set[Any]:
    """The functions that say something about a parameter without reading its data."""
    tensor = torch.Tensor
    getters = [
        "shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_leaf", "grad",
        "grad_fn", "names", "is_cuda", "is_meta", "is_quantized", "is_sparse", "is_cpu",
        "is_mkldnn", "is_nested", "is_xpu", "is_mps", "nbytes", "itemsize", "_version",
        "_backward_hooks", "output_nr", "retains_grad", "_base",
    ]  # fmt: skip
    methods = [
        "size", "stride", "dim", "numel", "nelement", "element_size", "storage_offset",
        "is_contiguous", "is_floating_point", "is_complex", "ndimension", "get_device",
        "__len__", "__hash__", "_is_view", "is_inference", "is_conj", "is_neg", "is_signed",
        "is_same_size", "is_shared", "is_pinned", "requires_grad_", "_is_zerotensor",
    ]  # fmt: skip
    reads = {getattr(tensor, name).__get__ for name in getters if hasattr(tensor, name)}
    reads |= {getattr(tensor, name) for name in methods if hasattr(tensor, name)}
    reads |= {getattr(tensor, name).__set__ for name in ("requires_grad", "grad")}
    return reads


_METADATA_READS = _metadata_reads()


class ShardedParameter(nn.Parameter):
    """A parameter whose data are in force as shards: metadata can be read, data cannot."""

    _fgtp_record: ShardRecord

    @classmethod
    def __torch_function__(
        cls,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        # Dynamo traces with the full metadata; the graph that it makes comes to our backend.
        if func in _METADATA_READS or torch.compiler.is_compiling():
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        sharded = next(_sharded_among((args, kwargs)), None)
        raise ShardedWeightError(_explain(sharded, getattr(func, "__name__", str(func))))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        record = self._fgtp_record
        return (
            f"ShardedParameter({record.cut.fqn}, full shape {list(record.cut.shape)}, "
            f"{record.cut.dtype}, 1/{record.group.size} on this rank)"
        )

    def __deepcopy__(self, memo: Any) -> Any:
        raise ShardedWeightError(_explain(self, "deepcopy"))

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ShardedWeightError(_explain(self, "pickle or torch.save"))


def _sharded_among(value: Any) -> Iterator[ShardedParameter]:
    if isinstance(value, ShardedParameter):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _sharded_among(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _sharded_among(item)


def _explain(parameter: ShardedParameter | None, operation: str) -> str:
    name = parameter._fgtp_record.cut.fqn if parameter is not None else "a weight"
    return (
        f"{operation}: {name} is sharded over its group by fgtp_pass, so this rank does not hold "
        "its data. Call fgtp_pass.full_state_dict(model) for a whole checkpoint, "
        "fgtp_pass.shard_state_dict(model) for this rank's shards, or fgtp_pass.unshard(model) "
        "to make the model whole again; call the compiled model, not the original, to run it. "
        "(If you did, Dynamo has probably reached torch._dynamo.config.recompile_limit and runs "
        "the model uncompiled.)"
    )


def record_of(value: object) -> ShardRecord | None:
    return value._fgtp_record if isinstance(value, ShardedParameter) else None


def shard_parameters(
    parameters: Mapping[nn.Parameter, tuple[WeightCut, ComponentGroup]],
    plan: Plan,
    packed: Set[nn.Parameter],
) -> int:
    """Replace the data of each parameter by this rank's shard and free the rest.

    packed: those whose shards are packed. Returns how many were not sharded before.

    Idempotent: a parameter that is sharded already is left as it is. Peak memory is the full
    model plus one weight, since one parameter is freed before the next is cut.
    """
    todo = {p: how for p, how in parameters.items() if not isinstance(p, ShardedParameter)}
    progress = tqdm(todo.items(), desc="sharding weights", unit="weight", disable=None, leave=False)
    with torch.inference_mode(False), torch.no_grad():
        for parameter, (cut, group) in progress:
            shard = _shard(parameter, cut, group, plan)
            if parameter in packed:  # now that the full one is freed
                packing.pack(shard)
    if any(parameter.device.type == "cpu" for parameter in todo):
        _return_freed_memory()
    return len(todo)


def _shard(
    parameter: nn.Parameter, cut: WeightCut, group: ComponentGroup, plan: Plan
) -> torch.Tensor:
    full = parameter.data
    shard = cut_local(full, cut, group.size, group.rank)
    # Equal metadata, no memory. The old storage goes when its last user lets go of it, which
    # is right for memory-mapped checkpoints and for storages that parameters share.
    hollow = torch.empty_strided(full.shape, full.stride(), dtype=full.dtype, device=full.device)
    hollow.untyped_storage().resize_(0)
    parameter.data = hollow
    parameter._fgtp_record = ShardRecord(shard, cut, group, plan)  # type: ignore[attr-defined]
    parameter.__class__ = ShardedParameter
    return shard


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
    record = parameter._fgtp_record
    whole = gather_full(record)
    with torch.inference_mode(False), torch.no_grad():
        parameter.__class__ = nn.Parameter  # type: ignore[assignment]
        del parameter._fgtp_record
        storage = parameter.data.untyped_storage()
        last = sum((n - 1) * s for n, s in zip(whole.shape, parameter.stride(), strict=True))
        storage.resize_((last + 1) * whole.dtype.itemsize)
        parameter.data.copy_(whole)


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
    for parameter in sharded_parameters(model).values():
        unshard_parameter(parameter)


def full_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """A normal checkpoint with full tensors, on every rank. Collective.

    Tied entries share one tensor, as in `state_dict`. Unsharded entries are not copied.
    """
    return _state_dict(model, gather_full)


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

"""A parameter whose data are in force as shards: it keeps its metadata and refuses its data."""

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fgtp_pass.agreement.control_group import ControlGroup
from fgtp_pass.collectives.groups import ComponentGroup
from fgtp_pass.errors import ShardedWeightError
from fgtp_pass.plan.plan import Plan, WeightCut
from fgtp_pass.weights import packing


@dataclass(eq=False)
class ShardRecord:
    """What a sharded parameter carries.

    shard: this rank's part, contiguous, padded with zeros; packed or plain (`packing`). cut, group:
    how to get the rest. plan: the plan that cut it. control: the ranks to meet with first.
    stays_plain: a graph reads it that cannot take it packed.
    """

    shard: torch.Tensor
    cut: WeightCut
    group: ComponentGroup
    plan: Plan
    control: ControlGroup
    stays_plain: bool = False

    def for_graph(self, takes_packed: bool) -> torch.Tensor:
        """The shard, to call a graph with; one that cannot take it packed unpacks it for good.

        A shard that a checkpoint has unpacked is packed again.
        """
        if not takes_packed:
            self.stays_plain = True
            packing.unpack(self.shard)
        elif not self.stays_plain and not packing.is_packed(self.shard):
            packing.pack(self.shard)
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


METADATA_READS = _metadata_reads()


class ShardedParameter(nn.Parameter):
    """A parameter whose data are in force as shards: metadata can be read, data cannot."""

    stands_for_plain_parameter = True  # see fgtp_pass.graph.inputs
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
        if func in METADATA_READS or torch.compiler.is_compiling():
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        sharded = next(_sharded_among((args, kwargs)), None)
        raise ShardedWeightError(_explain(sharded, getattr(func, "__name__", str(func))))

    # torch.distributed.checkpoint asks the tensors of a state dict for these three

    def __create_write_items__(self, fqn: str, object: object) -> list[Any]:
        from fgtp_pass.weights import checkpointable

        return checkpointable.write_items(self._fgtp_record, fqn)

    def __create_chunk_list__(self) -> list[Any]:
        from fgtp_pass.weights import checkpointable

        return checkpointable.chunks(self._fgtp_record)

    def __get_tensor_shard__(self, index: Any) -> torch.Tensor:
        from fgtp_pass.weights import checkpointable

        return checkpointable.chunk_memory(self._fgtp_record, index)

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


def make_plain(parameter: nn.Parameter, data: torch.Tensor) -> None:
    """Let a parameter without memory be a plain one with these data and the strides that it has."""
    with torch.inference_mode(False), torch.no_grad():
        parameter.__class__ = nn.Parameter
        if data.stride() != parameter.stride():
            strided = torch.empty_strided(
                data.shape, parameter.stride(), dtype=data.dtype, device=data.device
            )
            data = strided.copy_(data)
        parameter.data = data


def refuse_half_done_changes() -> None:
    """Let `load_state_dict` and `to` (and what is like it) refuse a module before they change it.

    They go through its parameters one by one, and would come to a sharded one with the others
    changed already. Idempotent.
    """
    for name in ("load_state_dict", "_apply"):
        stock = getattr(nn.Module, name)
        if not hasattr(stock, "_fgtp_stock"):
            setattr(nn.Module, name, _refusing(stock))


def _refusing(stock: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def refusing(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        sharded = next((p for p in self.parameters() if isinstance(p, ShardedParameter)), None)
        if sharded is not None and not kwargs.get("assign", False):
            name = "load_state_dict" if stock.__name__ == "load_state_dict" else "to"
            raise ShardedWeightError(_explain(sharded, name))
        return stock(self, *args, **kwargs)

    refusing._fgtp_stock = stock  # type: ignore[attr-defined]
    return refusing


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

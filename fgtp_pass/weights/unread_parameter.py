"""A parameter whose data are still in a checkpoint: it has its metadata, and no memory yet.

A model is compiled with such parameters as with any others, since Dynamo traces with metadata
alone. When the ranks have agreed on the plan, each reads the part that it keeps.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import nn

from fgtp_pass.errors import ShardedWeightError
from fgtp_pass.plan.plan import WeightCut
from fgtp_pass.weights.sharded_parameter import METADATA_READS, make_plain


class WeightSource(Protocol):
    """Where the data of one parameter come from.

    name: of the parameter in the model. dtype: of what is read. All ranks read the same parameters
    in the same order, so reading may be collective.
    """

    @property
    def name(self) -> str: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def whole(self) -> torch.Tensor:
        """The whole parameter, contiguous."""

    def shard(self, cut: WeightCut, size: int, rank: int) -> torch.Tensor:
        """What `cut_local` would give of the whole one."""


class UnreadParameter(nn.Parameter):
    """A parameter that has not been read: metadata can be read, data cannot."""

    stands_for_plain_parameter = True  # see fgtp_pass.graph.inputs
    _fgtp_source: WeightSource

    @classmethod
    def __torch_function__(
        cls,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in METADATA_READS or torch.compiler.is_compiling():
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        unread = next((v for v in args if isinstance(v, UnreadParameter)), None)
        raise ShardedWeightError(_explain(unread, getattr(func, "__name__", str(func))))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"UnreadParameter({self._fgtp_source.name}, {list(self.shape)}, {self.dtype})"

    def __deepcopy__(self, memo: Any) -> Any:
        raise ShardedWeightError(_explain(self, "deepcopy"))

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ShardedWeightError(_explain(self, "pickle or torch.save"))


def _explain(parameter: UnreadParameter | None, operation: str) -> str:
    name = parameter._fgtp_source.name if parameter is not None else "a weight"
    return (
        f"{operation}: {name} has not been read from its checkpoint. A weight is read when a "
        "compiled graph first takes it, so code that runs before that, or outside of graphs, "
        "cannot have it. If load_checkpoint has failed, call it again."
    )


def unread(like: nn.Parameter, source: WeightSource, device: torch.device) -> UnreadParameter:
    """An unread parameter in place of another one, which may be on the meta device."""
    made = nn.Parameter(
        torch.empty_strided(like.shape, like.stride(), dtype=source.dtype, device=device),
        requires_grad=like.requires_grad,
    )
    made.untyped_storage().resize_(0)
    made._fgtp_source = source  # type: ignore[attr-defined]
    made.__class__ = UnreadParameter
    assert isinstance(made, UnreadParameter)
    return made


def source_of(value: object) -> WeightSource | None:
    return value._fgtp_source if isinstance(value, UnreadParameter) else None


def read_whole(parameter: UnreadParameter) -> None:
    """Read all of an unread parameter, which then is a plain one, with the strides it had."""
    whole = parameter._fgtp_source.whole()
    del parameter._fgtp_source
    make_plain(parameter, whole)

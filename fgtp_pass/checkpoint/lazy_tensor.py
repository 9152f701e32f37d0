"""Tensors that are not read yet: any part of them can be, and no more than that part is.

A lazy tensor is a meta tensor with a recipe. Ops on it, such as those that turn a checkpoint's
tensors into a model's, run on the meta device and are remembered: views of what is stored stay
views, joined tensors know their parts, and anything else is computed when it is read.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

from fgtp_pass.errors import CheckpointError

_ATEN = torch.ops.aten


class Stored(Protocol):
    """Something that is one contiguous tensor once it is read."""

    def read_into(
        self, out: torch.Tensor, shape: Sequence[int], stride: Sequence[int], offset: int
    ) -> None:
        """Read a strided view of it, in elements, into `out`, which may have another dtype."""


@dataclass(frozen=True)
class _Joined:
    """Parts [(offsets in the whole, tensor)], which do not overlap.

    stacked: the dim that the whole has and its parts have not.
    """

    name: str
    parts: Sequence[tuple[tuple[int, ...], torch.Tensor]]
    stacked: int | None = None


@dataclass(frozen=True)
class _Computed:
    """An op on lazy tensors. index: which of its outputs."""

    run: Callable[..., Any]
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    index: int


def stored_tensor(stored: Stored, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A lazy tensor of something stored."""
    return _lazy(torch.empty(tuple(shape), dtype=dtype, device="meta"), stored)


def joined_tensor(
    name: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    parts: Sequence[tuple[tuple[int, ...], torch.Tensor]],
) -> torch.Tensor:
    """A lazy tensor of parts at offsets. Reading what no part covers raises CheckpointError."""
    return _lazy(torch.empty(tuple(shape), dtype=dtype, device="meta"), _Joined(name, parts))


def is_lazy(tensor: torch.Tensor) -> bool:
    return hasattr(_base(tensor), "_fgtp_recipe")


def _lazy(tensor: torch.Tensor, recipe: Any) -> torch.Tensor:
    tensor._fgtp_recipe = recipe  # type: ignore[attr-defined]
    return tensor


def _base(tensor: torch.Tensor) -> torch.Tensor:
    return tensor._base if tensor._is_view() and tensor._base is not None else tensor


class RememberOps(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within it, ops on lazy tensors make lazy tensors."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for index, made in enumerate(tree_iter(out)):
            if isinstance(made, torch.Tensor) and made.device.type == "meta":
                _lazy(made, _recipe(func, args, kwargs or {}, made, index))
        return out


def _recipe(
    func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], made: torch.Tensor, index: int
) -> Any:
    if func is _ATEN.clone.default:
        return _Joined("", [((0,) * made.dim(), args[0])])
    if func in (_ATEN.cat.default, _ATEN.stack.default):
        tensors, dim = args[0], args[1] if len(args) > 1 else kwargs.get("dim", 0)
        dim %= made.dim()
        stacked = dim if func is _ATEN.stack.default else None
        parts, start = [], 0
        for tensor in tensors:
            parts.append((tuple(start if d == dim else 0 for d in range(made.dim())), tensor))
            start += 1 if stacked is not None else tensor.shape[dim]
        return _Joined("", parts, stacked)
    return _Computed(func, args, kwargs, index)


def read(tensor: torch.Tensor) -> torch.Tensor:
    """A lazy tensor, or a view of one, in memory; one that is not lazy is returned as it is."""
    if not is_lazy(tensor):
        return tensor
    out = torch.empty(tensor.shape, dtype=tensor.dtype)
    read_into(out, tensor)
    return out


@torch.no_grad()
def read_into(out: torch.Tensor, tensor: torch.Tensor) -> None:
    """Read a lazy tensor, or a view of one, into memory that may have another dtype and device.

    Takes no other memory, except where an op has to be computed. Raises CheckpointError.
    """
    if not is_lazy(tensor):
        out.copy_(tensor)
        return
    base = _base(tensor)
    recipe = base._fgtp_recipe  # type: ignore[attr-defined]
    if isinstance(recipe, _Joined) and _is_box(tensor, base):
        _read_joined(out, recipe, tensor, base)
    elif isinstance(recipe, (_Joined, _Computed)):
        whole = torch.empty_strided(base.shape, base.stride(), dtype=base.dtype)
        if isinstance(recipe, _Joined):
            _read_joined(whole, recipe, base, base)
        else:
            made = recipe.run(*_in_memory(recipe.args), **_in_memory(recipe.kwargs))
            whole.copy_(list(tree_iter(made))[recipe.index])
        out.copy_(whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()))
    else:
        recipe.read_into(out, tensor.shape, tensor.stride(), tensor.storage_offset())


def _in_memory(arguments: Any) -> Any:
    return tree_map_only(torch.Tensor, read, arguments)


def _is_box(tensor: torch.Tensor, base: torch.Tensor) -> bool:
    """Whether a view of a contiguous tensor is a range of each of its dims."""
    return tensor.dim() == base.dim() and all(
        size <= 1 or mine == theirs
        for size, mine, theirs in zip(tensor.shape, tensor.stride(), base.stride(), strict=True)
    )


def _read_joined(
    out: torch.Tensor, recipe: _Joined, tensor: torch.Tensor, base: torch.Tensor
) -> None:
    """Read the parts that a box of the joined tensor overlaps."""
    starts, rest = [], tensor.storage_offset()
    for stride in base.stride():
        starts.append(rest // stride if stride else 0)
        rest %= max(1, stride)
    covered = 0
    for offsets, tensor_there in recipe.parts:
        part = tensor_there if recipe.stacked is None else tensor_there.unsqueeze(recipe.stacked)
        here, there = out, part
        for dim, (start, at) in enumerate(zip(starts, offsets, strict=True)):
            first = max(start, at)
            length = min(start + tensor.shape[dim], at + part.shape[dim]) - first
            if length <= 0:
                break
            here = here.narrow(dim, first - start, length)
            there = there.narrow(dim, first - at, length)
        else:
            read_into(here, there)
            covered += here.numel()
    if covered < tensor.numel():
        raise CheckpointError(
            f"{recipe.name}: the part of {list(tensor.shape)} at {starts} is not all in the "
            f"checkpoint: {tensor.numel() - covered} of its {tensor.numel()} values are in none of "
            "its files. A checkpoint that several hosts saved to local disks is whole once all of "
            "their files are in one folder."
        )

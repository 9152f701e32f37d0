"""Each move of the placement algebra on tensors [tokens, features], written through `emit`.

Several values that move together travel in one message. rows: of this rank's own tokens; k: the
size of the group.
"""

import operator
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F

from fgtp_pass.collectives import functional
from fgtp_pass.collectives.functional import Emit
from fgtp_pass.collectives.groups import ComponentGroup
from fgtp_pass.plan.plan import WeightCut


def own_to_cut(emit: Emit, group: ComponentGroup, x: Any, rows: Any, cut: WeightCut) -> Any:
    """[rows, W] -> [k*rows, W/k]: each rank gets its features of everyone's tokens.

    cut: of the weight that takes these features, along its inputs.
    """
    k, width = group.size, cut.block_width(group.size)
    parts = emit(torch.reshape, _padded(emit, x, cut, k), (rows, k, width))
    by_rank = emit(torch.transpose, parts, 0, 1)
    # explicit sizes: a -1 would make the number of rows a guard
    flat = emit(torch.reshape, by_rank, (_times(emit, rows, k), width))
    return functional.all_to_all(emit, group, flat, rows)


def all_to_cut(emit: Emit, group: ComponentGroup, x: Any, cut: WeightCut) -> Any:
    """[k*rows, W] -> [k*rows, W/k]: the features that this rank's weights take. Nothing moves."""
    width = cut.block_width(group.size)
    padded = _padded(emit, x, cut, group.size)
    return _contiguous(emit, emit(torch.narrow, padded, 1, group.rank * width, width))


def all_to_own(emit: Emit, group: ComponentGroup, x: Any, rows: Any) -> Any:
    """[k*rows, W] -> [rows, W]: this rank's tokens. Nothing moves."""
    return emit(torch.narrow, x, 0, _times(emit, rows, group.rank), rows)


def cut_to_own(
    emit: Emit, group: ComponentGroup, values: Sequence[Any], rows: Any, cuts: Sequence[WeightCut]
) -> list[Any]:
    """[k*rows, W/k] -> [rows, W]: each rank gets all features of its own tokens.

    cuts: of the weights that made these features, along their outputs.
    """
    widths = [cut.blocks * cut.block_width(group.size) for cut in cuts]
    parts = functional.all_to_all(emit, group, _joined(emit, values), rows)
    return [
        _assembled(emit, part, rows, cut, group.size)
        for part, cut in zip(_split(emit, parts, widths), cuts, strict=True)
    ]


def cut_to_all(
    emit: Emit, group: ComponentGroup, x: Any, rows: Any, cut: WeightCut, residual: Any = None
) -> tuple[Any, Any]:
    """[k*rows, W/k] -> [k*rows, W], and a residual [rows, W] of each rank -> [k*rows, W].

    cut: of the weight that made these features, along its outputs. The residual, if any, travels in
    the same message.
    """
    k, width = group.size, cut.blocks * cut.block_width(group.size)
    every, features = _times(emit, rows, k), cut.shape[cut.dim]
    if residual is None:
        parts = functional.all_gather(emit, group, x)
        return _assembled(emit, parts, every, cut, k), None
    extra = k * width - features
    own = emit(F.pad, residual, (0, extra)) if extra else residual
    message = emit(torch.cat, [x, emit(torch.reshape, own, (every, width))])
    gathered = functional.all_gather(emit, group, message)
    parts = emit(torch.reshape, gathered, (k, 2, every, width))
    mine, theirs = (emit(torch.select, parts, 1, which) for which in (0, 1))
    whole = _assembled(emit, mine, every, cut, k)
    residuals = emit(torch.reshape, theirs, (every, k * width))
    if extra:
        residuals = emit(torch.narrow, residuals, 1, 0, features)
    return whole, residuals


def sum_to_own(
    emit: Emit, group: ComponentGroup, values: Sequence[Any], rows: Any, widths: Sequence[int]
) -> list[Any]:
    """Partial sums [k*rows, W] -> [rows, W]: each rank gets the sums of its own tokens."""
    whole = functional.reduce_scatter(emit, group, _joined(emit, values), rows, sum(widths))
    parts = _split(emit, whole, widths)
    return parts if len(parts) == 1 else [_contiguous(emit, part) for part in parts]


def sum_to_all(
    emit: Emit,
    group: ComponentGroup,
    x: Any,
    rows: Any,
    features: int,
    given: torch.dtype,
    wanted: torch.dtype,
    residual: Any = None,
) -> Any:
    """Partial sums [k*rows, features] of dtype `given` -> sums of dtype `wanted` on every rank.

    residual: [rows, features] of this rank's tokens, of dtype `given`, added to them. Half
    precision is added in fp32 and rounded once, the residual included.
    """
    wide = torch.float32 if wanted.itemsize < 4 else wanted
    partial = x if given is wide else emit(torch.Tensor.to, x, wide)
    if residual is not None:
        own = residual if given is wide else emit(torch.Tensor.to, residual, wide)
        before = _times(emit, rows, group.rank)
        after = _times(emit, rows, group.size - 1 - group.rank)
        partial = emit(torch.add, partial, emit(F.pad, own, (0, 0, before, after)))
    whole = functional.all_reduce(emit, group, partial, _times(emit, rows, group.size), features)
    return whole if wide is wanted else emit(torch.Tensor.to, whole, wanted)


def times_whole(
    emit: Emit,
    x: Any,
    rows: Any,
    parts: Any,
    cut: WeightCut,
    k: int,
    out_dim: int,
    dtype: torch.dtype,
) -> Any:
    """[rows, in] x the weight whose shards are `parts`, one after the other in dim 0: [rows, out].

    Shards that are rows of the weight make it up as they lie, but for the order of blocks, which
    the result's features are put in; those that are columns are multiplied one by one, so that the
    weight is never copied.
    """
    if cut.dim == 0 and out_dim == 0:
        return in_order(emit, emit(F.linear, x, parts), rows, cut, k)
    if cut.dim == 0:
        whole = emit(torch.narrow, parts, 0, 0, cut.shape[0])
        return emit(torch.mm, x, whole)
    height, width = cut.shape[0], cut.block_width(k)
    shards = [emit(torch.narrow, parts, 0, rank * height, height) for rank in range(k)]
    if out_dim == 1:
        results = [emit(torch.mm, x, shard) for shard in shards]
        return in_order(emit, emit(torch.cat, results, 1), rows, cut, k)
    products = []
    for rank, shard in enumerate(shards):
        own = min(width, cut.shape[1] - rank * width)
        if own > 0:
            features = emit(torch.narrow, x, 1, rank * width, own)
            columns = emit(torch.narrow, shard, 1, 0, own) if own < width else shard
            products.append(emit(F.linear, features, columns))
    return _added_up(emit, products, dtype)


def _added_up(emit: Emit, products: Sequence[Any], dtype: torch.dtype) -> Any:
    """Their sum; half precision is added in fp32 and rounded once."""
    if len(products) == 1:
        return products[0]
    half = dtype.itemsize < 4
    total = emit(torch.Tensor.to, products[0], torch.float32) if half else products[0]
    for product in products[1:]:
        total = emit(torch.add, total, product)
    return emit(torch.Tensor.to, total, dtype) if half else total


def in_order(emit: Emit, x: Any, rows: Any, cut: WeightCut, k: int) -> Any:
    """[rows, k * blocks * width] with ranks outside blocks, as shards lie -> [rows, features]."""
    blocks, width = cut.blocks, cut.block_width(k)
    block = cut.shape[cut.dim] // blocks
    if blocks > 1:
        by_rank = emit(torch.reshape, x, (rows, k, blocks, width))
        x = emit(torch.reshape, emit(torch.transpose, by_rank, 1, 2), (rows, blocks, k * width))
        if k * width > block:
            x = emit(torch.narrow, x, 2, 0, block)
        return emit(torch.reshape, x, (rows, blocks * block))
    return _contiguous(emit, emit(torch.narrow, x, 1, 0, block)) if k * width > block else x


def _times(emit: Emit, rows: Any, factor: int) -> Any:
    return rows * factor if isinstance(rows, int) else emit(operator.mul, rows, factor)


def _padded(emit: Emit, x: Any, cut: WeightCut, k: int) -> Any:
    padding = k * cut.block_width(k) - cut.shape[cut.dim]
    return emit(F.pad, x, (0, padding)) if padding else x


def _assembled(emit: Emit, parts: Any, rows: Any, cut: WeightCut, k: int) -> Any:
    """[k*rows, blocks * width], the ranks' features one after the other -> [rows, features]."""
    blocks, width = cut.blocks, cut.block_width(k)
    block = cut.shape[cut.dim] // blocks
    by_rank = emit(torch.reshape, parts, (k, rows, blocks, width))
    by_token = emit(torch.permute, by_rank, (1, 2, 0, 3))
    whole = emit(torch.reshape, by_token, (rows, blocks, k * width))
    if k * width > block:
        whole = _contiguous(emit, emit(torch.narrow, whole, 2, 0, block))
    return emit(torch.reshape, whole, (rows, blocks * block))


def _joined(emit: Emit, values: Sequence[Any]) -> Any:
    return values[0] if len(values) == 1 else emit(torch.cat, list(values), 1)


def _split(emit: Emit, x: Any, widths: Sequence[int]) -> list[Any]:
    """The columns of `x`, by widths: views of it."""
    if len(widths) == 1:
        return [x]
    starts = accumulate(widths, initial=0)
    return [emit(torch.narrow, x, 1, start, w) for start, w in zip(starts, widths, strict=False)]


def _contiguous(emit: Emit, x: Any) -> Any:
    """As a matmul's result is: the graph may go on with a `view` of it, or write into it."""
    return emit(torch.Tensor.contiguous, x)

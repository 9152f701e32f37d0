"""The region of an FFN between its up and its down matmuls: what of it may run on cut features."""

import heapq
from dataclasses import dataclass

import torch
from torch import fx

from fgtp_pass.graph.aliasing import written_nodes
from fgtp_pass.graph.dataflow import GraphView
from fgtp_pass.graph.normal_form import ParamMatmul
from fgtp_pass.graph.op_kinds import (
    SHAPE_READS,
    OpKind,
    argument,
    is_tensor,
    is_value,
    keeps_token_order,
    op_kind,
    op_name,
    same_leading,
    tensor_inputs,
    value_of,
)

# An activation function is a handful of ops; a walk that grows past this left the region long ago.
_MAX_OPS = 64


@dataclass(frozen=True, eq=False)
class Region:
    """Ops local to a feature, from the outputs of `ups` to `result`, rebuilt at any width.

    ops: the nodes to re-emit, in graph order; views are left out, as the rebuilt region works on
    [tokens, features] throughout. alias: for each view, the node that it stands for. blocks: for
    each value, which blocks of `width` features it holds (a fused up projection holds 0 and 1).
    vectors: parameters of shape [features] that the ops read, cut like the features.
    shape_reads: nodes outside that read the shape of an inner value.
    """

    ups: tuple[ParamMatmul, ...]
    result: fx.Node
    width: int
    ops: tuple[fx.Node, ...]
    alias: dict[fx.Node, fx.Node]
    blocks: dict[fx.Node, tuple[int, ...]]
    vectors: tuple[fx.Node, ...]
    shape_reads: tuple[fx.Node, ...]


@dataclass(frozen=True)
class NoRegion:
    """Why there is no region in front of a matmul, and whether it reads projections at all."""

    reason: str
    reads_projection: bool


def find_region(view: GraphView, down: ParamMatmul) -> Region | NoRegion:
    """The region in front of `down`, or the reason why there is none that can be cut."""
    ups, inner, reason = _walk_back(view, down)
    if not reason and not ups:
        reason = "it reads no other projection"
    found = reason or _check(view, down, ups, inner)
    return NoRegion(found, reads_projection=bool(ups)) if isinstance(found, str) else found


def _walk_back(view: GraphView, down: ParamMatmul) -> tuple[list[ParamMatmul], list[fx.Node], str]:
    """The matmuls that `down` reads through pointwise and layout ops, the ops in between, and a
    reason if it reads anything else.

    Visits the nearest node first, so that a walk that leaves the FFN ends after a few steps.
    """
    heap = [-view.order[down.input]]
    by_order = {view.order[down.input]: down.input}
    ups: list[ParamMatmul] = []
    inner: list[fx.Node] = []
    while heap:
        node = by_order[-heapq.heappop(heap)]
        matmul = view.matmul_at(node)
        if matmul is not None:
            ups.append(matmul)
            continue
        kind = op_kind(node)
        if kind is OpKind.FEATURES and op_name(node) != "glu":
            return ups, inner, f"a {op_name(node)} over all its inner features stands before it"
        if kind not in (OpKind.POINTWISE, OpKind.LAYOUT, OpKind.FEATURES) or len(inner) >= _MAX_OPS:
            return ups, inner, "its input is no function of projections alone"
        inner.append(node)
        for n in tensor_inputs(node):
            if not view.facts[n].static and view.order[n] not in by_order:
                by_order[view.order[n]] = n
                heapq.heappush(heap, -view.order[n])
    return ups[::-1], inner[::-1], ""


def _check(
    view: GraphView, down: ParamMatmul, ups: list[ParamMatmul], inner: list[fx.Node]
) -> Region | str:
    assert down.weight is not None
    width = down.weight.in_features
    alias: dict[fx.Node, fx.Node] = {}
    blocks: dict[fx.Node, tuple[int, ...]] = {}
    vectors: dict[fx.Node, None] = {}
    ops: list[fx.Node] = []
    for up in ups:
        if up.weight is None:
            return f"the projection before it cannot be cut: {up.why_not}"
        if up.weight.out_features % width:
            return "its inner width is no multiple of the projection before it"
        blocks[up.node] = tuple(range(up.weight.out_features // width))
    for node in inner:
        reason = _check_op(view, node, width, alias, blocks, vectors, ops)
        if reason:
            return reason
    result = alias.get(down.input, down.input)
    if blocks.get(result) is None or len(blocks[result]) != 1:
        return "its inner features are not laid out in blocks"
    shape_reads = _outside_uses({up.node for up in ups} | set(inner), down.node)
    if isinstance(shape_reads, str):
        return shape_reads
    for shaped in (down.node, *(read.all_input_nodes[0] for read in shape_reads)):
        if not view.follows_from_inputs(value_of(shaped).shape):
            return "it has a shape that depends on data"
    return Region(tuple(ups), result, width, tuple(ops), alias, blocks, tuple(vectors), shape_reads)


def _check_op(
    view: GraphView,
    node: fx.Node,
    width: int,
    alias: dict[fx.Node, fx.Node],
    blocks: dict[fx.Node, tuple[int, ...]],
    vectors: dict[fx.Node, None],
    ops: list[fx.Node],
) -> str:
    """Record one op of the region; a reason if it cannot run on a part of the features."""
    for written in written_nodes(node):
        if len(written.users) > 1:
            return "an inner value that is used again is changed in place"
    if op_kind(node) is OpKind.LAYOUT:
        source = node.all_input_nodes[0]
        source = alias.get(source, source)
        if is_tensor(node) and keeps_token_order(node):
            alias[node] = source
            return ""
        return _check_split(node, source, width, blocks, ops)
    if any(view.varies_by_rank(n) for n in node.all_input_nodes):
        return "a value that may be another on each rank stands between its projections"
    inputs = tensor_inputs(node)
    held = {blocks[alias.get(n, n)] for n in inputs if alias.get(n, n) in blocks}
    if len({len(b) for b in held}) != 1:
        return "differently laid out inner features meet"
    shaped = [n for n in inputs if alias.get(n, n) in blocks]
    if not all(same_leading(n, node) for n in shaped):
        return "its inner features are broadcast over tokens"
    for n in inputs:
        if alias.get(n, n) not in blocks:
            reason = _check_static_operand(view, n, width * len(next(iter(held))), vectors)
            if reason:
                return reason
    blocks[node] = min(held)
    if op_name(node) == "glu":  # the first half of its blocks, gated by the second
        if argument(node, "dim", 1, -1) not in (-1, value_of(node).dim() - 1) or len(min(held)) % 2:
            return "its inner features are rearranged"
        blocks[node] = min(held)[: len(min(held)) // 2]
    ops.append(node)
    return ""


def _check_static_operand(
    view: GraphView, node: fx.Node, full_width: int, vectors: dict[fx.Node, None]
) -> str:
    value = value_of(node)
    if not isinstance(value, torch.Tensor) or not view.facts[node].static:
        return "its inner features meet another activation"
    if value.numel() == 1 and value.dim() <= 1:
        return ""
    if node in view.parameters and tuple(value.shape) == (full_width,):
        vectors[node] = None
        return ""
    return "its inner features meet a constant that is not laid out like them"


def _check_split(
    node: fx.Node,
    source: fx.Node,
    width: int,
    blocks: dict[fx.Node, tuple[int, ...]],
    ops: list[fx.Node],
) -> str:
    """Splits of fused features: `chunk`, `split`, and slices at the borders of blocks."""
    refused = "its inner features are rearranged"
    held = blocks.get(source)
    if held is None or not is_value(source):
        return refused
    name = op_name(node)
    if name in ("chunk", "split"):
        value, dim = value_of(source), argument(node, "dim", 2, 0)
        parts = value_of(node)
        if dim not in (-1, value.dim() - 1) or any(p.shape[-1] != width for p in parts):
            return refused
        blocks[node] = held
    elif name == "getitem" and not is_tensor(source):
        blocks[node] = (held[node.args[1]],)  # type: ignore[index]
    elif name == "getitem":
        picked = _slice_of_last_dim(node, source)
        if picked is None or picked.start % width or (picked.stop - picked.start) % width:
            return refused
        blocks[node] = held[picked.start // width : picked.stop // width]
    else:
        return refused
    ops.append(node)
    return ""


def _slice_of_last_dim(node: fx.Node, source: fx.Node) -> range | None:
    """The features that `x[..., a:b]` keeps, or None for any other index."""
    index = node.args[1]
    if not isinstance(index, tuple) or not isinstance(index[-1], slice):
        return None
    if any(i is not Ellipsis and i != slice(None) for i in index[:-1]):
        return None
    if Ellipsis not in index and len(index) != value_of(source).dim():
        return None
    bounds = (index[-1].start, index[-1].stop, index[-1].step)
    if not all(b is None or isinstance(b, int) for b in bounds):
        return None
    picked = range(*index[-1].indices(int(value_of(source).shape[-1])))
    return picked if picked.step == 1 else None


def _outside_uses(inner: set[fx.Node], down: fx.Node) -> tuple[fx.Node, ...] | str:
    """The nodes outside that read the shape of an inner value; a reason if one reads its data."""
    shape_reads = []
    for node in inner:
        for user in node.users:
            if user in inner or user is down:
                continue
            if op_name(user) not in SHAPE_READS:
                return "its inner features are used elsewhere too"
            shape_reads.append(user)
    return tuple(shape_reads)

"""What stands between two sites and computes each token by itself: adds, norms, scales, casts.

Such ops may run on the tokens of the whole group, so that the sites need not return to each rank's
own tokens between them.
"""

import heapq
from collections.abc import Collection
from dataclasses import dataclass

from torch import fx

from fgtp_pass.graph.aliasing import written_nodes
from fgtp_pass.graph.dataflow import GraphView
from fgtp_pass.graph.op_kinds import (
    CASTS,
    OpKind,
    argument,
    count_of,
    is_tensor,
    keeps_token_order,
    keeps_values,
    op_kind,
    op_name,
    same_leading,
    tensor_inputs,
    value_of,
)

# A residual add and a norm are a handful of ops; a walk that grows past this has gone astray.
_MAX_OPS = 48
# ops over the features that take which dims these are, with the argument's position
_OVER_DIM = {
    "mean": 1, "sum": 1, "amax": 1, "amin": 1, "softmax": 1, "log_softmax": 1, "norm": 2,
    "vector_norm": 2, "var": 1, "std": 1, "logsumexp": 1, "normalize": 2,
}  # fmt: skip
_KEEP_DIM = {"softmax", "log_softmax", "normalize"}
_NORMS = {"layer_norm", "rms_norm"}


@dataclass(frozen=True, eq=False)
class TokenRegion:
    """Ops local to a token, from `source` to `result`, which may be one node.

    ops: the nodes to re-emit on other tokens, in graph order; views are left out, as everything is
    [tokens, features] there. alias: for each view, the node that it stands for. residual: the one
    other activation that they read, or None. added: the op that adds it to `source` and to nothing
    else, which nothing else reads, or None. widened: the casts of the two before they are added.
    """

    source: fx.Node
    result: fx.Node
    ops: tuple[fx.Node, ...]
    alias: dict[fx.Node, fx.Node]
    residual: fx.Node | None
    added: fx.Node | None
    widened: frozenset[fx.Node]

    @property
    def inner(self) -> set[fx.Node]:
        return {*self.ops, *self.alias, self.source}


def find_token_region(
    view: GraphView, sources: Collection[fx.Node], result: fx.Node, reader: fx.Node
) -> TokenRegion | None:
    """The region that ends in `result` and begins at the last of `sources` that it is made of.

    reader: where the result is read. None where something in between is not local to a token, or
    the graph changes what is read.
    """
    walked = _walk_back(view, sources, result)
    if walked is None:
        return None
    source, inner, others = walked
    if len(others) > 1 or not _is_tokens(source):
        return None
    residual = others[0] if others else None
    if residual is not None and not _alike(source, residual):
        return None
    alias: dict[fx.Node, fx.Node] = {}
    known = {source} | ({residual} if residual is not None else set())
    ops: list[fx.Node] = []
    for node in inner:
        if not _is_local(view, node, source, known, alias):
            return None
        known.add(node)
        if node not in alias:
            ops.append(node)
    if source is not result and result not in known:
        return None
    if _changes(view, source, residual, inner, reader):
        return None
    added, widened = _added(source, residual, ops, alias)
    return TokenRegion(source, result, tuple(ops), alias, residual, added, widened)


def _walk_back(
    view: GraphView, sources: Collection[fx.Node], result: fx.Node
) -> tuple[fx.Node, list[fx.Node], list[fx.Node]] | None:
    """The source, the nodes between it and `result`, and the older activations that these read.

    Visits the latest node first, so what is left when the source comes up is older than it.
    """
    heap = [-view.order[result]]
    by_order = {view.order[result]: result}
    inner: list[fx.Node] = []
    while heap:
        node = by_order[-heapq.heappop(heap)]
        if node in sources:
            older = [by_order[-order] for order in sorted(heap)]
            return node, inner[::-1], older
        if op_kind(node) not in (OpKind.POINTWISE, OpKind.FEATURES, OpKind.LAYOUT):
            return None
        if len(inner) >= _MAX_OPS:
            return None
        inner.append(node)
        for n in tensor_inputs(node):
            if not view.facts[n].static and view.order[n] not in by_order:
                by_order[view.order[n]] = n
                heapq.heappush(heap, -view.order[n])
    return None


def _is_tokens(node: fx.Node) -> bool:
    return is_tensor(node) and value_of(node).dim() >= 2


def _alike(one: fx.Node, other: fx.Node) -> bool:
    """Whether a residual can travel with a value: as many tokens, as wide, of the same dtype."""
    if not _is_tokens(other):
        return False
    a, b = value_of(one), value_of(other)
    same = a.dtype is b.dtype and a.shape[-1:] == b.shape[-1:]
    return same and count_of(a.shape[:-1]) == count_of(b.shape[:-1])


def _is_local(
    view: GraphView,
    node: fx.Node,
    source: fx.Node,
    known: set[fx.Node],
    alias: dict[fx.Node, fx.Node],
) -> bool:
    """Whether the op computes each token by itself, also on [tokens, features]. Notes views."""
    inputs = tensor_inputs(node)
    active = [n for n in inputs if not view.facts[n].static]
    if not active or not all(n in known for n in active) or not is_tensor(node):
        return False
    if op_kind(node) is OpKind.LAYOUT:
        if len(inputs) != 1 or not (keeps_token_order(node) or _takes_everything(node)):
            return False
        if value_of(node).dim() < 2:
            return False
        alias[node] = alias.get(inputs[0], inputs[0])
        return True
    if not all(same_leading(n, node) for n in active):
        return False  # broadcast over tokens
    if any(n is not source or len(n.users) > 1 for n in written_nodes(node)):
        return False
    static = [value_of(n) for n in inputs if view.facts[n].static]
    if any(value.dim() > 1 for value in static):
        return False
    if any(view.varies_by_rank(n) for n in node.all_input_nodes):
        return False
    return op_kind(node) is OpKind.POINTWISE or _over_last_dim(node)


def _takes_everything(node: fx.Node) -> bool:
    """`x[:, 0:, :]`, which `logits_to_keep=0` makes of a decoder's output."""
    if op_name(node) != "getitem" or not is_tensor(node.args[0]):
        return False
    index = node.args[1]
    parts = index if isinstance(index, tuple) else (index,)
    whole = (slice(None), slice(0, None), slice(0, None, None), Ellipsis)
    return all(any(part is w or part == w for w in whole) for part in parts)


def _over_last_dim(node: fx.Node) -> bool:
    """Whether an op over features is over the last dim alone, and keeps the others."""
    name = op_name(node)
    if name.rpartition("::")[2] in _NORMS and "::" in name:
        return True  # a fused norm of a host: (x, weight, epsilon)
    if name in _NORMS:
        shape = argument(node, "normalized_shape", 1)
        return isinstance(shape, (tuple, list)) and len(shape) == 1
    if name not in _OVER_DIM:
        return False
    dims = argument(node, "dim", _OVER_DIM[name])
    if dims not in (-1, [-1], (-1,)):
        return False
    kept = node.kwargs.get("keepdim", any(a is True for a in node.args[1:]))
    return name in _KEEP_DIM or kept is True


def _changes(
    view: GraphView,
    source: fx.Node,
    residual: fx.Node | None,
    inner: list[fx.Node],
    reader: fx.Node,
) -> bool:
    """Whether the graph changes in place what the region reads or holds, before all is read.

    Its results for own tokens are slices of those for all, so what changes one changes the other.
    The residual is read where `source` stands.
    """
    within = set(inner)
    touched = view.memory_of([source, *inner])
    for op, written in view.writes.items():
        early = view.order[source] < view.order[op] < view.order[reader]
        if early and op not in within and written & touched:
            return True
    if residual is None:
        return False
    readers = [n for n in inner if residual in tensor_inputs(n)]
    last = max(readers, key=view.order.__getitem__)
    return view.may_change(residual, after=source, before=last)


def _added(
    source: fx.Node, residual: fx.Node | None, ops: list[fx.Node], alias: dict[fx.Node, fx.Node]
) -> tuple[fx.Node | None, frozenset[fx.Node]]:
    """The op that adds the residual to `source` and to nothing else, if nothing else reads it.

    With the casts to a wider dtype of either, which it alone reads.
    """
    none: tuple[None, frozenset[fx.Node]] = (None, frozenset())
    if residual is None:
        return none
    stands_for, casts = {source: source, residual: residual}, set[fx.Node]()
    stands_for |= {view: node for view, node in alias.items() if node in stands_for}
    for op in ops:
        read = [n for n in op.all_input_nodes if n in stands_for]
        if op_name(op) in CASTS and len(read) == 1 and _widens(read[0], op):
            stands_for[op] = stands_for[read[0]]
            stands_for |= {view: stands_for[op] for view, node in alias.items() if node is op}
            casts.add(op)
            continue
        operands = [a for a in op.args if isinstance(a, fx.Node)]
        both = op_name(op) == "add" and len(operands) == 2 and not op.kwargs
        if not both or {stands_for.get(n) for n in operands} != {source, residual}:
            return none
        of_source = {n for n, what in stands_for.items() if what is source}
        alone = of_source | casts
        if any(user is not op and user not in alone for n in alone for user in n.users):
            return none
        return op, frozenset(casts)
    return none


def _widens(narrow: fx.Node, wide: fx.Node) -> bool:
    return keeps_values(value_of(narrow).dtype, value_of(wide).dtype)

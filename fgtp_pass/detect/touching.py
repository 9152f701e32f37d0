"""touching: which sites touch, so that one need not return to own tokens for the other."""

from collections.abc import Container, Sequence
from dataclasses import dataclass

from torch import fx

from fgtp_pass.detect.match import Match, MatmulStage
from fgtp_pass.graph.dataflow import GraphView
from fgtp_pass.graph.op_kinds import (
    is_tensor,
    keeps_token_order,
    op_name,
    same_shape,
    tensor_inputs,
    value_of,
)
from fgtp_pass.graph.token_region import TokenRegion, find_token_region


@dataclass(frozen=True, eq=False)
class Beside:
    """Two sites whose results are added to each other, as attention and FFN side by side.

    total: the node that holds the sum. residual: what `total` holds beside the two, or None. inner:
    the nodes between the two and `total`.
    """

    first: Match
    second: Match
    total: fx.Node
    residual: fx.Node | None
    inner: frozenset[fx.Node]

    @property
    def between(self) -> tuple[Match, Match]:
        return self.first, self.second


@dataclass(frozen=True, eq=False)
class Behind:
    """`second` reads the result of `first`, one site or two beside each other, through `region`."""

    first: Match | Beside
    second: Match
    region: TokenRegion

    @property
    def last(self) -> Match:
        """The site that hands the tokens of all on: of two beside each other the second."""
        return self.first.second if isinstance(self.first, Beside) else self.first

    @property
    def between(self) -> tuple[Match, Match]:
        return self.last, self.second


@dataclass(frozen=True)
class Links:
    """All links of a graph; a site is the second of at most one `Behind`."""

    beside: tuple[Beside, ...] = ()
    behind: tuple[Behind, ...] = ()

    def between(self, sites: Container[Match]) -> "Links":
        """The links between these sites."""

        def kept(one: Match | Beside) -> bool:
            return (
                one.first in sites and one.second in sites
                if isinstance(one, Beside)
                else one in sites
            )

        return Links(
            tuple(pair for pair in self.beside if kept(pair)),
            tuple(link for link in self.behind if kept(link.first) and link.second in sites),
        )


def find_links(view: GraphView, matches: Sequence[Match]) -> Links:
    """The links between sites. Reads the graph; says nothing of whether they pay."""
    beside = _find_beside(view, matches)
    paired = {id(match) for pair in beside for match in (pair.first, pair.second)}
    producers: dict[fx.Node, Match | Beside] = {pair.total: pair for pair in beside}
    alone = [m for m in matches if id(m) not in paired and len(m.outputs) == 1]
    producers |= {match.place: match for match in alone}
    behind = []
    for match in matches:
        if isinstance(match.stages[0], MatmulStage):
            region = find_token_region(view, producers.keys(), match.source, match.place)
            if region is not None and _can_hand_over(view, producers[region.source], region):
                behind.append(Behind(producers[region.source], match, region))
    return Links(tuple(beside), tuple(behind))


def _can_hand_over(view: GraphView, first: Match | Beside, region: TokenRegion) -> bool:
    """Whether the tokens of all can be handed on, and own tokens be given back in their shapes.

    Two beside each other bring their residual in their sum, and can carry no other.
    """
    if isinstance(first, Beside) and first.residual and region.residual:
        return False
    shapes = [value_of(node).shape for node in (*region.inner, region.result)]
    return all(view.follows_from_inputs(shape) for shape in shapes)


# beside -------------------------------------------------------------------------------------------


def _find_beside(view: GraphView, matches: Sequence[Match]) -> list[Beside]:
    by_output = {match.place: match for match in matches if _ends_in_a_matmul(match)}
    found: list[Beside] = []
    taken: set[fx.Node] = set()
    for node in view.graph.nodes:
        pair = _sum_of_two(view, node, by_output)
        if pair is not None and not taken & {pair.first.place, pair.second.place}:
            found.append(pair)
            taken |= {pair.first.place, pair.second.place}
    return found


def _ends_in_a_matmul(match: Match) -> bool:
    last = match.stages[-1]
    return isinstance(last, MatmulStage) and len(match.outputs) == 1


def _sum_of_two(view: GraphView, node: fx.Node, by_output: dict[fx.Node, Match]) -> Beside | None:
    """a + b, or (r + a) + b with an activation r, where a and b are results of two sites."""
    operands = _plain_add(node)
    if operands is None:
        return None
    a, b = operands
    site_a, site_b = _only_for(a, node, by_output), _only_for(b, node, by_output)
    if site_a is not None and site_b is not None:
        return _beside(view, node, (site_a, site_b), None, set())
    for before, site in ((a, site_b), (b, site_a)):
        inner = _plain_add(before)
        if site is None or inner is None or set(before.users) != {node}:
            continue
        for residual, own in (inner, inner[::-1]):
            first = _only_for(own, before, by_output)
            if first is not None and not view.facts[residual].static:
                return _beside(view, node, (first, site), residual, {before})
    return None


_Operand = tuple[Match, set[fx.Node]]


def _only_for(node: fx.Node, user: fx.Node, by_output: dict[fx.Node, Match]) -> _Operand | None:
    """The site whose result `node` is, through views, if `user` alone reads it; and the views."""
    views: set[fx.Node] = set()
    while True:
        if set(node.users) != {user}:
            return None
        if node in by_output:
            return by_output[node], views
        if not keeps_token_order(node) or len(tensor_inputs(node)) != 1:
            return None
        views.add(node)
        user, node = node, tensor_inputs(node)[0]


def _beside(
    view: GraphView,
    total: fx.Node,
    sites: tuple[_Operand, _Operand],
    residual: fx.Node | None,
    inner: set[fx.Node],
) -> Beside | None:
    (one, one_views), (other, other_views) = sites
    if one is other:
        return None
    first, second = sorted((one, other), key=lambda match: view.order[match.place])
    inner = inner | one_views | other_views
    own = view.memory_of([first.place, second.place])
    if any(written & own for op, written in view.writes.items() if op not in (total, *inner)):
        return None
    if residual is not None and (
        view.order[residual] > view.order[first.place]
        or view.may_change(residual, after=first.place, before=total)
        or view.memory_of([residual]) & view.writes.get(total, frozenset())
    ):
        return None
    return Beside(first, second, total, residual, frozenset(inner))


def _plain_add(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The operands of an add of two activations of one shape and dtype, unscaled."""
    if op_name(node) != "add" or node.kwargs or len(node.args) != 2:
        return None
    a, b = node.args
    if not (isinstance(a, fx.Node) and isinstance(b, fx.Node) and is_tensor(a) and is_tensor(b)):
        return None
    same = same_shape(a, node) and same_shape(b, node)
    same = same and value_of(a).dtype is value_of(b).dtype is value_of(node).dtype
    return (a, b) if same and value_of(node).dim() >= 2 else None

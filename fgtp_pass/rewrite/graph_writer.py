"""GraphWriter: the nodes of a rewritten graph, in the order of the old one's."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from fgtp_pass import dynamo
from fgtp_pass.algebra.placement import Placement
from fgtp_pass.collectives.groups import ComponentGroup
from fgtp_pass.detect.match import LookupStage, Match, MatmulStage
from fgtp_pass.detect.touching import Behind
from fgtp_pass.graph.op_kinds import count_of, value_of
from fgtp_pass.graph.size_expression import size_expression, size_inputs
from fgtp_pass.plan.planner import PlannedGraph, PlannedSite
from fgtp_pass.rewrite import moves
from fgtp_pass.rewrite.group_values import GroupValues
from fgtp_pass.rewrite.lowering import pad_tokens, rows_of
from fgtp_pass.rewrite.rewriter import Rewriter


class GraphWriter:
    """Writes the nodes behind the placeholders: sites along their paths, all else as it is."""

    def __init__(
        self,
        rewriter: Rewriter,
        planned: PlannedGraph,
        groups: Mapping[int, ComponentGroup],
        shards: Mapping[fx.Node, fx.Node],
        rows: Mapping[str, tuple[fx.Node, torch.Tensor]] | None,
    ):
        self.rewriter, self.emit, self.env = rewriter, rewriter.emit, rewriter.env
        self.planned, self.row_inputs = planned, rows
        placeholders = {p for site in planned.sites for p in site.cuts}
        local = {p: shards.get(p, self.env.get(p)) for p in placeholders}
        self.values = GroupValues(self.emit, planned, groups, local, self.env, self._own)
        self.pairs = {site: pair for pair in planned.beside for site in (pair.first, pair.second)}
        # by the first site of a stretch: tokens, rows, and nodes whose sizes its values have
        self.counts: dict[Match, tuple[Any, Any, list[fx.Node]]] = {}
        # by node between sites: the site in front of it
        self.before = {n: link.last for link in planned.behind for n in link.region.inner}
        self.flat: dict[fx.Node, fx.Node] = {}
        self.inputs = size_inputs(rewriter.old)
        self.needed = _needed_by_its_own_rank(planned)

    def write(self) -> None:
        places = {site.match.place: site for site in self.planned.sites}
        replaced, shape_reads = replaced_nodes(self.planned), _shape_reads(self.planned.sites)
        for node in self.rewriter.old.nodes:
            if node.op == "placeholder":
                continue
            if node in places:
                self._site(places[node])
            elif node in self.values.ops:
                value = self.values.op(node)
                if node in self.needed:
                    self._give_back(node, value)
            elif node in replaced or (node in self.before and node not in self.needed):
                continue
            elif node not in self.env:
                if node in shape_reads:
                    self._stand_in_for_shape(node.all_input_nodes[0], shape_reads[node].match)
                self.rewriter.copy(node)

    # sites ------------------------------------------------------------------------------------

    def _site(self, site: PlannedSite) -> None:
        """Emit one site in place of its first output node."""
        match, path = site.match, site.path
        _, rows, known = self._counts_of(match)
        if path.start is Placement.OWN and match.source not in known:
            known.append(match.source)
        values = self.values.site(site, rows)
        if path.end is Placement.OWN:
            pair = self.pairs.get(match)
            outputs = match.outputs if pair is None else (pair.total,)
            for output, value in zip(outputs, values.values, strict=True):
                self.env[output] = self._as(output, value, match)
            if pair is not None and pair.residual is not None:
                residual, total = self.env[pair.residual], self.env[pair.total]
                self.env[pair.total] = self.emit(torch.add, residual, total)
        elif path.end is Placement.ALL:
            for link in self.planned.behind:
                if link.last is match:
                    self._hand_on(link, known)

    def _hand_on(self, link: Behind, known: list[fx.Node]) -> None:
        region = link.region
        known += [region.residual] if region.residual is not None else []
        for node in (region.source, region.added):
            if node is not None and node in self.values.every and node in self.needed:
                self._give_back(node, self.values.every[node])

    def _counts_of(self, match: Match) -> tuple[Any, Any, list[fx.Node]]:
        """Of the stretch that the site is in; its first site's source is there when one is read."""
        front = self.planned.fronts[match]
        if front.match not in self.counts:
            self.counts[front.match] = (*self._count(front), [front.match.source])
        return self.counts[front.match]

    def _count(self, site: PlannedSite) -> tuple[Any, Any]:
        """This rank's tokens, and the rows that it runs at."""
        ids = isinstance(site.match.stages[0], LookupStage)
        source = site.match.source
        x = self._flat(source, None if ids else int(value_of(source).shape[-1]))
        tokens = _static_rows(x) or rows_of(self.emit, x)
        if self.row_inputs is None:
            return tokens, tokens
        row_input, _ = self.row_inputs[site.site.component]
        return tokens, rows_of(self.emit, row_input)

    def _own(self, node: fx.Node, rows: Any, features: int | None) -> fx.Node:
        """The rank's own tokens of a value, flat, and padded to `rows` if they are ragged."""
        x = self._flat(node, features)
        if self.row_inputs is None:
            return x
        padded: fx.Node = pad_tokens(self.emit, x, rows, features)
        return padded

    def _flat(self, node: fx.Node, features: int | None) -> fx.Node:
        """[..., features] -> [tokens, features]; ids: [...] -> [tokens]. Once for each value."""
        if node not in self.flat:
            shape = (-1,) if features is None else (-1, features)
            self.flat[node] = self.emit(torch.reshape, self.env[node], shape)
        return self.flat[node]

    # own tokens -------------------------------------------------------------------------------

    def _give_back(self, node: fx.Node, value: Any) -> None:
        """Let the value of the own tokens be known to what is no part of a stretch."""
        if node in self.env:
            return
        front = self.planned.fronts[self.before[node]]
        _, rows, _ = self._counts_of(front.match)
        own = moves.all_to_own(self.emit, self.values.groups[front.site.group_size], value, rows)
        self.env[node] = self._as(node, own, self.before[node])

    def _as(self, node: fx.Node, value: Any, match: Match) -> Any:
        """[rows, features] in the shape that the node has, without padding."""
        tokens, _, known = self._counts_of(match)
        if self.row_inputs is not None:
            value = self.emit(torch.narrow, value, 0, 0, tokens)
        wanted = value_of(node)
        if value_of(value).dtype is not wanted.dtype:  # under autocast: a sum, or a late bias
            value = self.emit(torch.Tensor.to, value, wanted.dtype)
        if wanted.dim() == 2 and not isinstance(match.stages[0], LookupStage):
            return value
        leading = [self._size_like(size, tokens, known) for size in wanted.shape[:-1]]
        return self.emit(torch.reshape, value, (*leading, int(wanted.shape[-1])))

    def _stand_in_for_shape(self, inner: fx.Node, match: Match) -> None:
        """Let `inner`, which is no longer computed, be an expanded scalar of its shape."""
        tokens, _, known = self._counts_of(match)
        sizes = [self._size_like(size, tokens, known) for size in value_of(inner).shape]
        scalar = self.emit(torch.Tensor.new_empty, self.env[known[0]], (1,))
        self.env[inner] = self.emit(torch.Tensor.expand, scalar, sizes)

    def _size_like(self, size: Any, tokens: Any, known: Sequence[fx.Node]) -> Any:
        """A value equal to `size`: read from values that have it, or computed from the inputs."""
        if isinstance(size, int):
            return size
        for node in known:
            for dim, other in enumerate(value_of(node).shape):
                if size_expression(other) == size_expression(size):
                    return self.emit(torch.ops.aten.sym_size.int, self.env[node], dim)
        if isinstance(tokens, fx.Node) and size_expression(size) == count_of([value_of(tokens)]):
            return tokens
        return dynamo.emit_size(self.emit, size, self._symbols(size))

    def _symbols(self, size: torch.SymInt) -> dict[Any, fx.Node]:
        """The nodes that hold the symbols of a size, read from inputs (detection has checked)."""
        inputs, where = self.rewriter.old.find_nodes(op="placeholder"), self.inputs
        nodes = {}
        for symbol in size.node.expr.free_symbols:
            position, dim = where[symbol]
            node = self.env[inputs[position]]
            if dim is not None:
                node = self.emit(torch.ops.aten.sym_size.int, node, dim)
            nodes[symbol] = node
        return nodes


def _needed_by_its_own_rank(planned: PlannedGraph) -> set[fx.Node]:
    """The nodes between sites whose values for a rank's own tokens are read elsewhere."""
    inner = set[fx.Node]().union(*(link.region.inner for link in planned.behind))
    readers = inner.union(*(link.second.nodes for link in planned.behind))
    residuals = {link.region.residual for link in planned.behind}
    residuals |= {pair.residual for pair in planned.beside}
    alias = {view for link in planned.behind for view in link.region.alias}
    needed: set[fx.Node] = set()
    for node in reversed(planned.detection.view.graph.nodes):
        if node not in inner:
            continue
        elsewhere = any(user not in readers or user in needed & alias for user in node.users)
        if elsewhere or node in residuals:
            needed.add(node)
    return needed


def _static_rows(x: fx.Node) -> int | None:
    rows = value_of(x).shape[0]
    return rows if isinstance(rows, int) else None


def _shape_reads(sites: Sequence[PlannedSite]) -> dict[fx.Node, PlannedSite]:
    """The nodes outside a site that read the shape of a value inside it."""
    return {
        read: site
        for site in sites
        for stage in site.match.stages
        if isinstance(stage, MatmulStage) and stage.region is not None
        for read in stage.region.shape_reads
    }


def replaced_nodes(planned: PlannedGraph) -> set[fx.Node]:
    """The nodes that are not copied: the sites' own, what stands between those that touch, and what
    only they use.
    """
    replaced = set[fx.Node]().union(*(site.match.nodes for site in planned.sites))
    replaced = replaced.union(*({*pair.inner, pair.total} for pair in planned.beside))
    for site in planned.sites:
        for matmul in _matmuls(site):
            stack = [n for n in matmul.node.all_input_nodes if n is not matmul.input]
            while stack:  # W.T, W.to(dtype) ...
                node = stack.pop()
                if node.op != "placeholder" and all(user in replaced for user in node.users):
                    replaced.add(node)
                    stack += node.all_input_nodes
    return replaced


def _matmuls(site: PlannedSite) -> list[Any]:
    return [
        matmul
        for stage in site.match.stages
        if isinstance(stage, MatmulStage)
        for matmul in stage.matmuls
    ]

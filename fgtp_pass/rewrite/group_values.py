"""What the ranks of a group compute on the tokens of all of them: sites, and what stands between.

Used to write graphs and idle programs alike; these differ in where own tokens come from.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import fx

from fgtp_pass.algebra.path import RESIDUAL, Move
from fgtp_pass.algebra.placement import Placement
from fgtp_pass.collectives.functional import Emit
from fgtp_pass.collectives.groups import ComponentGroup
from fgtp_pass.detect.match import LookupStage, Match
from fgtp_pass.detect.touching import Behind, Beside
from fgtp_pass.graph.op_kinds import value_of
from fgtp_pass.plan.planner import PlannedGraph, PlannedSite
from fgtp_pass.rewrite.feature_ops import emit_again
from fgtp_pass.rewrite.lowering import SiteLowering, Values
from fgtp_pass.rewrite.whole_weights import WholeWeights

# (node, rows, features) -> this rank's own tokens, [rows, features]; features None: ids, [rows]
Own = Callable[[fx.Node, Any, int | None], Any]


class GroupValues:
    """Lowers the sites of a planned graph, in graph order, and the ops between those that touch.

    every: by node, its value for all tokens of the group, [k*rows, features]. ops: nodes to emit
    with `op`, where they stand.
    """

    def __init__(
        self,
        emit: Emit,
        planned: PlannedGraph,
        groups: Mapping[int, ComponentGroup],
        local: Mapping[fx.Node, Any],
        outer: Mapping[fx.Node, Any],
        own: Own,
    ):
        self.emit, self.groups, self.local, self.outer, self.own = emit, groups, local, outer, own
        self._whole = WholeWeights(emit, planned.sites, groups, local)
        self.every: dict[fx.Node, Any] = {}
        self._pairs = {site: pair for pair in planned.beside for site in (pair.first, pair.second)}
        self._behind: dict[Match | Beside, list[Behind]] = {}
        for link in planned.behind:
            self._behind.setdefault(link.first, []).append(link)
        self._sums: dict[Beside, Values] = {}
        self._alias = {view: n for link in planned.behind for view, n in link.region.alias.items()}
        self.ops = {op for link in planned.behind for op in link.region.ops}

    def site(self, site: PlannedSite, rows: Any) -> Values:
        """Emit a site; what it gives, in the placement where its path ends.

        rows: those that each rank has in the site's stretch.
        """
        match = site.match
        if site.path.start is Placement.ALL:
            x = self.every[self._alias.get(match.source, match.source)]
        else:
            ids = isinstance(match.stages[0], LookupStage)
            x = self.own(match.source, rows, None if ids else _features(match.source))
        pair = self._pairs.get(match)
        residual = None
        if any(isinstance(s, Move) and RESIDUAL in s.carries for s in site.path.steps):
            residual = self._residual_of(pair or match)
        group = self.groups[site.site.group_size]
        links = self._behind.get(pair or match, [])
        added = next((link.region.added for link in links if residual is not None), None)
        lowering = SiteLowering(self.emit, site, group, self.local, self.outer, self._whole)
        values = lowering.run(
            x,
            rows,
            self.own(residual, rows, _features(residual)) if residual is not None else None,
            self._sums.get(pair) if pair is not None else None,
            value_of(added or match.outputs[0]).dtype,
        )
        if pair is not None and site.path.end is Placement.SUM:
            self._sums[pair] = values
        if site.path.end is Placement.ALL:
            self._hand_on(pair or match, values, residual)
        return values

    def op(self, node: fx.Node) -> Any:
        """Emit an op that stands between two sites, on the tokens of the group."""
        args, kwargs = fx.map_arg((node.args, node.kwargs), self._operand)
        self.every[node] = emit_again(self.emit, node, args, kwargs)
        return self.every[node]

    def _operand(self, node: fx.Node) -> Any:
        stands_for = self._alias.get(node, node)
        if stands_for in self.every:
            return self.every[stands_for]
        assert node not in self._alias, f"{node} is not known for the tokens of the group"
        return self.outer[node]

    def _residual_of(self, first: Match | Beside) -> fx.Node | None:
        if isinstance(first, Beside) and first.residual is not None:
            return first.residual
        return self._behind[first][0].region.residual

    def _hand_on(self, first: Match | Beside, values: Values, residual: fx.Node | None) -> None:
        region = self._behind[first][0].region
        node = region.source
        if residual is not None and values.residual is None and region.added is not None:
            node = region.added  # the sum has the residual in it
            self.ops -= region.widened
        self.every[node] = values.values[0]
        self.ops.discard(node)
        if residual is not None and values.residual is not None:
            self.every[residual] = values.residual


def _features(node: fx.Node) -> int:
    return int(value_of(node).shape[-1])

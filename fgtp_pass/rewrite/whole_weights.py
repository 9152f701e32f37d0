"""Weights that are gathered whole for one step, for sites that see more tokens than weights.

Each gather is started when the weight before it comes into use, and awaited when its own turn has
come: so it runs beside the matmul before, and no more than two gathered weights are there at once.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx

from fgtp_pass.collectives import functional
from fgtp_pass.collectives.functional import Emit
from fgtp_pass.collectives.groups import ComponentGroup
from fgtp_pass.detect.match import MatmulStage
from fgtp_pass.graph.op_kinds import value_of
from fgtp_pass.plan.planner import PlannedSite
from fgtp_pass.weights import packing


class WholeWeights:
    """The gathered weights of a graph, in the order in which its sites take them."""

    def __init__(
        self,
        emit: Emit,
        sites: Sequence[PlannedSite],
        groups: Mapping[int, ComponentGroup],
        shards: Mapping[fx.Node, Any],
    ):
        self._emit, self._shards = emit, shards
        self._turns = [
            (placeholder, groups[site.site.group_size])
            for site in sites
            for placeholder in gathered_parameters(site)
        ]
        self._next = 0  # turn to be taken
        self._started: list[Any] = []

    def take(self, placeholder: fx.Node) -> Any:
        """The shards of all ranks, [n, ...], one after the other in dim 0: [k * n, ...]."""
        expected, _ = self._turns[self._next]
        assert placeholder is expected, "sites take their weights in graph order"
        self._next += 1
        self._start(self._next + 1)
        return functional.wait(self._emit, self._started[self._next - 1])

    def _start(self, turns: int) -> None:
        for placeholder, group in self._turns[len(self._started) : turns]:
            shard = self._shards[placeholder]
            if value_of(placeholder).device.type == "cpu":  # it may be packed
                shard = self._emit(packing.PLAIN, shard)
            self._started.append(functional.start_all_gather(self._emit, group, shard))


def gathered_parameters(site: PlannedSite) -> list[fx.Node]:
    """The cut parameters of the stages that take their weights whole, in the order of their use."""
    found: list[fx.Node] = []
    for stage, cut in zip(site.match.stages, site.path.applied, strict=True):
        if cut is not None or not isinstance(stage, MatmulStage):
            continue
        for matmul in stage.matmuls:
            found += [matmul.weight.placeholder] if matmul.weight is not None else []
            found += [matmul.bias] if matmul.bias is not None else []
        found += stage.region.vectors if stage.region is not None else ()
    return [placeholder for placeholder in found if site.cuts[placeholder].cut_dim is not None]

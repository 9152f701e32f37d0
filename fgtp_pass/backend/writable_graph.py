"""A graph of Dynamo, rewritten along the paths for any number of tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import fx

from fgtp_pass import dynamo
from fgtp_pass.collectives.groups import ComponentGroup
from fgtp_pass.plan.planner import PlannedGraph, Shards
from fgtp_pass.rewrite.idle_graph import idle_graph, idle_needs
from fgtp_pass.rewrite.rewrite import RewrittenGraph, rewrite
from fgtp_pass.step.program import Key
from fgtp_pass.step.step import collectives_of
from fgtp_pass.step.token_counts import TokenCounter
from fgtp_pass.weights import packing


@dataclass(frozen=True, eq=False)
class Written:
    """The graph along one choice of paths: see `fgtp_pass.step.program.Program`."""

    rewritten: RewrittenGraph
    packed: frozenset[int]
    collectives: tuple[str, ...]
    idle: fx.GraphModule


class WritableGraph:
    """A graph with its plan and all that writing it takes; it stays as it is.

    in_force: the parameters that are sharded already. groups: this rank's component groups by size.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        planned: PlannedGraph,
        groups: Mapping[int, ComponentGroup],
        in_force: Shards,
        ragged: bool,
    ):
        self.module, self.planned, self.groups = module, planned, groups
        self.ragged = ragged
        self._in_force = in_force
        self.counter = TokenCounter(module.graph, planned.sites)
        self._packed: frozenset[int] | None = None  # the shards that decode reads packed

    def write(self, key: Key) -> Written:
        """The first time, while Dynamo traces, also decides how shards are stored."""
        planned = self.planned.at(key)
        rewritten = self._rewrite(planned)
        packed = _packable(rewritten)
        if self._packed is None:
            self._packed = packed if key == self._decode else self._packed_in_decode()
        packed &= self._packed
        packing.take_packed(rewritten.module, packed)
        idle = idle_graph(self.module, planned, rewritten.gathered, self.groups, self._idle_needs)
        packing.take_packed(idle, [i for i, n in enumerate(self.idle_positions) if n in packed])
        collectives = collectives_of(planned.sites, rewritten.gathered.values())
        return Written(rewritten, packed, collectives, idle)

    def _rewrite(self, planned: PlannedGraph) -> RewrittenGraph:
        return rewrite(self.module, planned, self.groups, self._in_force, self.ragged)

    @property
    def _decode(self) -> Key:
        return self.planned.program(dict.fromkeys(self.counter.components, 1))

    def _packed_in_decode(self) -> frozenset[int]:
        rewritten = self._rewrite(self.planned.at(self._decode))
        dynamo.forget_guards(rewritten.row_inputs)
        return _packable(rewritten)

    @property
    def idle_positions(self) -> Sequence[int]:
        """The inputs that an idle rank takes part with."""
        placeholders = self.module.graph.find_nodes(op="placeholder")
        return [i for i, node in enumerate(placeholders) if node in self._idle_needs]

    @cached_property
    def _idle_needs(self) -> set[fx.Node]:
        cut = {p for s in self.planned.sites for p, c in s.cuts.items() if c.cut_dim is not None}
        return idle_needs(self.planned, cut | self._in_force.keys())


def _packable(rewritten: RewrittenGraph) -> frozenset[int]:
    return packing.packable(rewritten.module.graph, rewritten.shards)

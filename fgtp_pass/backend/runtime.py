"""The way of one graph on this rank: detect, plan, agree, rewrite, shard, compile."""

import logging
import math
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import fx, nn
from torch.utils.weak import WeakIdKeyDictionary

from fgtp_pass import dynamo
from fgtp_pass.agreement.control_group import (
    ONE_AT_A_TIME,
    ControlGroup,
    all_ranks,
    reporting_failure,
)
from fgtp_pass.agreement.equality import differing_items, require_same_items
from fgtp_pass.agreement.hosts import ranks_on_smallest_host
from fgtp_pass.agreement.message import Intent
from fgtp_pass.backend.inner import Compiled, compile_inner, compile_later
from fgtp_pass.backend.writable_graph import WritableGraph, Written
from fgtp_pass.collectives.groups import ComponentGroup, DataParallelGroup
from fgtp_pass.detect.detect import Detection, detect
from fgtp_pass.dynamo import SizeGuard
from fgtp_pass.errors import AgreementError, ConfigError
from fgtp_pass.options.auto_sizes import SizeChooser
from fgtp_pass.options.options import Options
from fgtp_pass.plan.plan import Plan, Site, WeightCut, format_bytes
from fgtp_pass.plan.planner import PlannedGraph, check_requested, plan_graph
from fgtp_pass.step.idle_inputs import IdleInputs
from fgtp_pass.step.idle_step import note_step
from fgtp_pass.step.program import Key, Program, Programs
from fgtp_pass.step.step import Step, sites_number
from fgtp_pass.step.token_counts import RowGuards
from fgtp_pass.versions import library_versions
from fgtp_pass.weights.checksum import checksum
from fgtp_pass.weights.shard import (
    forget_shard,
    read_parameters,
    shard_parameters,
    unshard_parameter,
)
from fgtp_pass.weights.sharded_parameter import ShardedParameter, record_of
from fgtp_pass.weights.unread_parameter import UnreadParameter, WeightSource, source_of

log = logging.getLogger("fgtp_pass")


class Runtime:
    """What compiled graphs with the same options and group share on this rank."""

    def __init__(self, options: Options, group: DataParallelGroup):
        self.options = options
        self.group = group
        self.everyone = all_ranks(group)
        with reporting_failure(self.everyone):
            self._chooser = SizeChooser(
                options, group, self.everyone, ranks_on_smallest_host(group)
            )
        # ragged steps learn the number of rows to run at when they exchange counts
        self._exchanges = options.check_tokens or options.tokens == "ragged"
        # by parameter, what the ranks have agreed on for it
        self._agreed: Any = WeakIdKeyDictionary()
        # by parameter, the graphs that read its shard, to be written along other paths
        self._graphs: Any = WeakIdKeyDictionary()
        self._controls: dict[int, ControlGroup] = {}

    @property
    def sizes(self) -> Mapping[str, int]:
        """Group sizes by component, 1 for off."""
        return self._chooser.sizes

    @property
    def step_control(self) -> ControlGroup:
        """The ranks that this one runs in step with: the smallest group with all its groups."""
        size = math.lcm(*self.sizes.values())
        if size not in self._controls:
            self._controls[size] = ControlGroup(self.group, size)
        return self._controls[size]

    def compile(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
        """The callable for one graph; shards its weights if it is the first that reads them.

        A graph of weights that the ranks have agreed on is one that Dynamo traced anew for another
        shape. The other ranks need not trace it, so it is compiled without asking them, and cuts
        nothing.
        """
        parameters = [v for v in inputs if isinstance(v, nn.Parameter)]
        agreed = [self._agreed.get(p) for p in parameters]
        joins = all(one is None or one.joins for one in agreed)
        kinds = [None if one is None else one.kind for one in agreed]
        if kinds == [type(parameter) for parameter in parameters]:
            return self._compile_again(gm, inputs, joins)
        with ONE_AT_A_TIME:
            compiled, joins = self._compile_together(gm, inputs, parameters, joins)
        for parameter in parameters:
            self._agreed[parameter] = _Agreed(type(parameter), joins)
        return compiled

    def _compile_again(self, gm: fx.GraphModule, inputs: Sequence[Any], joins: bool) -> Compiled:
        in_force = _in_force(gm, inputs)
        with reporting_failure(self.step_control if self._exchanges and in_force else None):
            detection = self._detect(gm, inputs).only(in_force)
            planned = self._plan(gm, inputs, detection, joins)
            return self._compile(gm, inputs, self._write(gm, inputs, planned))

    def _compile_together(
        self,
        gm: fx.GraphModule,
        inputs: Sequence[Any],
        parameters: Sequence[nn.Parameter],
        joins: bool,
    ) -> tuple[Compiled, bool]:
        """Compile in step with all ranks, which agree before weights are touched and after.

        A rank that fails makes all of them raise, and the weights are whole again. Also returns
        whether sites that touch share stretches.
        """
        for size in sorted(self.group.run_in_step):
            # where another rank is in a step, all of them hear at once that this one is not
            ControlGroup(self.group, size).exchange(Intent.SHARD)
        with reporting_failure(self.everyone):
            detection = self._detect(gm, inputs)
            self._chooser.see(detection)
            planned = self._plan(gm, inputs, detection, joins)
            check_requested(planned.plan, self.options.sizes.requested, self.options.allow_missing)
        planned, joins = self._agree(gm, inputs, detection, planned, joins)
        with reporting_failure(self.everyone):
            written = self._write(gm, inputs, planned)
            checksums = self._checksums(inputs, written)
        require_same_items(
            self.everyone,
            checksums,
            "the data-parallel ranks hold different weights:",
            "They must load the same checkpoint, or be made from one seed; nothing was sharded.",
        )
        before = {p: source_of(p) for p in parameters if not isinstance(p, ShardedParameter)}
        try:
            with reporting_failure(self.everyone):
                compiled = self._compile(gm, inputs, written)
            self.everyone.exchange(Intent.SHARD, payload="compiled")
        except Exception as error:
            self._give_back(before, error)
            raise
        if written is not None:
            self.group.run_in_step.add(self.step_control.size)
        return compiled, joins

    def _give_back(
        self, before: Mapping[nn.Parameter, WeightSource | None], cause: Exception
    ) -> None:
        """Undo the sharding of those that were whole, or unread, where a source is given.

        Collective; tells if a rank is away.
        """
        for parameter, source in before.items():
            if source is not None:
                forget_shard(parameter, source)
        sharded = [p for p in before if isinstance(p, ShardedParameter)]
        if sharded and isinstance(cause, AgreementError) and cause.away:
            raise AgreementError(
                f"{cause} The weights of this rank are shards now, and the rest of them cannot be "
                "reached: once all ranks have come back, call fgtp_pass.unshard, or load the model "
                "anew.",
                shared=True,
                away=True,
            ) from cause
        with self.step_control.running([]):
            for parameter in sharded:
                unshard_parameter(parameter)

    def _detect(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Detection:
        return detect(gm.graph, inputs, self.options.all_patterns)

    def _plan(
        self, gm: fx.GraphModule, inputs: Sequence[Any], detection: Detection, joins: bool
    ) -> PlannedGraph:
        """What to do with the graph, as far as it fits with what is sharded already."""
        in_force = _in_force(gm, inputs)
        planned = plan_graph(
            detection,
            self.sizes,
            self.group.size,
            in_force,
            prices=self._chooser.prices,
            joins=joins,
        )
        chosen = tuple(self._chooser.chosen.values())
        plan = planned.plan.model_copy(update={"chosen": chosen})
        return replace(planned, plan=plan)

    def _agree(
        self,
        gm: fx.GraphModule,
        inputs: Sequence[Any],
        detection: Detection,
        planned: PlannedGraph,
        joins: bool,
    ) -> tuple[PlannedGraph, bool]:
        """Compare options, library versions and sites on all ranks; raises on every one.

        A graph in which a size is the number 1 does not show what is broadcast over tokens, so a
        rank with one token may see sites touch that do not on others. Then no sites share a
        stretch, on any rank. Returns the plan, and whether they may.
        """
        self.everyone.require_equal(
            {
                "sizes": self.sizes,
                "tokens": self.options.tokens,
                "check_tokens": self.options.check_tokens,
                "check_weights": self.options.check_weights,
                **library_versions(),
            }
        )
        odd = differing_items(self.everyone, _paths(planned.plan))
        if odd:
            with reporting_failure(self.everyone):
                planned = self._plan(gm, inputs, detection, joins=False)
        require_same_items(
            self.everyone,
            {_name(site): site.model_dump_json() for site in planned.plan.sites},
            "the data-parallel ranks differ in plan:",
            "They must run the same model with the same options and libraries.",
        )
        if not odd:
            return planned, joins
        if self.group.rank == 0:
            log.warning(
                "not all ranks see the same sites touch, so none of them share a stretch, which "
                "costs up to one collective more per layer: %s",
                odd,
            )
        return planned, False

    def _checksums(self, inputs: Sequence[Any], given: "_ToCompile | None") -> dict[str, str]:
        """Of the weights that are to be cut, by name; none if they are not to be compared."""
        if given is None or not self.options.check_weights:
            return {}
        return {
            cut.fqn: checksum(inputs[position])
            for position, (cut, _) in given.written.rewritten.shards.items()
            if not isinstance(inputs[position], (ShardedParameter, UnreadParameter))
        }

    def _write(
        self, gm: fx.GraphModule, inputs: Sequence[Any], planned: PlannedGraph
    ) -> "_ToCompile | None":
        """The rewritten graph, or None for a graph that stays as it is."""
        in_force = _in_force(gm, inputs)
        if not planned.sites and not in_force:
            return None
        sizes = {site.site.group_size for site in planned.sites}
        sizes |= {size for _, size in in_force.values()}
        groups = {size: self.group.component_group(size) for size in sorted(sizes)}
        for record in filter(None, map(record_of, inputs)):
            if record.group != groups[record.group.size]:
                raise ConfigError(
                    f"{record.cut.fqn} is sharded over the ranks {record.group.ranks} by another "
                    "compiled model with another process_group. Call fgtp_pass.unshard first."
                )
        graph = WritableGraph(gm, planned, groups, in_force, self.options.tokens == "ragged")
        # the other ranks' tokens are not known yet
        return _ToCompile(graph, planned.traced, graph.write(planned.traced))

    def _compile(
        self, gm: fx.GraphModule, inputs: Sequence[Any], given: "_ToCompile | None"
    ) -> Compiled:
        """Shard what is whole, and compile the rewritten graph."""
        if given is None:
            read_parameters(inputs)
            return compile_inner(self.options, gm, inputs)
        graph, written = given.graph, given.written
        shards, plan = written.rewritten.shards, graph.planned.plan
        how: dict[nn.Parameter, tuple[WeightCut, ComponentGroup] | None] = {
            value: None for value in inputs if isinstance(value, nn.Parameter)
        }
        how |= {inputs[i]: (cut, graph.groups[size]) for i, (cut, size) in shards.items()}
        packed = {inputs[i] for i in written.packed}
        new = shard_parameters(how, plan, packed, self.step_control)
        if new and self.group.rank == 0:
            freed = format_bytes(plan.bytes_saved_per_rank)
            log.info("sharded %d weights, %s freed per rank", new, freed)
            log.debug("%s", plan)
        compiled, guards = self._compile_first(inputs, written)
        # Dynamo keeps what it compiled; what else may be written of the graph goes with the model
        for position in shards:
            before = [] if new else self._graphs.get(inputs[position], [])
            self._graphs[inputs[position]] = [*before, graph]
        programs = Programs(graph.planned.firsts, partial(self._program, weakref.ref(graph)))
        programs.made[given.key] = _as_program(graph, written, compiled, guards)
        step = Step(
            programs=programs,
            shards=tuple(shards),
            counter=graph.counter,
            sites=sites_number(graph.planned.sites),
            control=self.step_control,
            exchanges=self._exchanges,
            ragged=graph.ragged,
            idle=IdleInputs(graph.idle_positions),
        )
        note_step(step, (inputs[position] for position in shards))
        return step

    def _compile_first(
        self, inputs: Sequence[Any], written: Written
    ) -> tuple[Compiled, list[SizeGuard]]:
        """Compile with the shards, real and of static shape, in the place of the parameters."""
        given, rewritten = list(inputs), written.rewritten
        for position in rewritten.shards:
            record = record_of(inputs[position])
            assert record is not None
            given[position] = record.for_graph(position in written.packed)
        static = [given[position] for position in rewritten.shards]
        rows = rewritten.row_examples
        with dynamo.new_inputs(static, rows, rewritten.row_inputs) as guards:
            compiled = compile_inner(self.options, rewritten.module, [*given, *rows])
        return compiled, guards

    def _program(self, kept: "weakref.ref[WritableGraph]", key: Key) -> Program:
        """The graph along the paths for another number of tokens, compiled when it first runs."""
        graph = kept()
        assert graph is not None, "its parameters are those of the step"
        written = graph.write(key)
        compiled = compile_later(self.options, written.rewritten.module)
        log.info("compiling a graph for another number of tokens per rank: %s", written.collectives)
        return _as_program(graph, written, compiled, [])


@dataclass(frozen=True)
class _Agreed:
    """What the ranks agreed on for a parameter.

    kind: the class that it had then. joins: whether sites that touch may share a stretch.
    """

    kind: type
    joins: bool


@dataclass(frozen=True, eq=False)
class _ToCompile:
    """A graph, and what was written of it for the number of tokens that it was traced with."""

    graph: WritableGraph
    key: Key
    written: Written


def _as_program(
    graph: WritableGraph, written: Written, compiled: Compiled, guards: Sequence[SizeGuard]
) -> Program:
    for one in (written.rewritten.module, written.idle):
        dynamo.forget_values(one.graph)
    return Program(
        run=compiled,
        packed=written.packed,
        collectives=written.collectives,
        guards=RowGuards(graph.module.graph, guards),
        idle=written.idle,
    )


def _name(site: Site) -> str:
    return f"{site.component} {site.weights[0].fqn}"


def _paths(plan: Plan) -> dict[str, str]:
    """By site, its paths: which sites share a stretch, without what is computed in it."""
    return {
        _name(site): "; ".join([site.path, *(one.path for one in site.ranges)])
        for site in plan.sites
    }


def _in_force(gm: fx.GraphModule, inputs: Sequence[Any]) -> dict[fx.Node, tuple[WeightCut, int]]:
    """The placeholders of parameters that are sharded already, and how."""
    found = {}
    for node, value in zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True):
        record = record_of(value)
        if record is not None:
            found[node] = (record.cut, record.group.size)
    return found

"""The Dynamo backend: graph -> detect -> plan -> agree -> rewrite and shard -> inner backend."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import fx, nn
from torch.utils.weak import WeakIdKeyDictionary

from fgtp_pass import dynamo, packing, weights
from fgtp_pass.agreement import (
    Act,
    Council,
    ranks_on_smallest_host,
    tell,
    telling,
    wide_council,
)
from fgtp_pass.auto import SizeChooser
from fgtp_pass.collectives import (
    ComponentGroup,
    DataParallelGroup,
    data_parallel_group,
)
from fgtp_pass.config import Options, parse_options
from fgtp_pass.detect import Detection, detect
from fgtp_pass.dynamo import SizeGuard
from fgtp_pass.errors import ConfigError, FgtpError, InferenceOnlyError
from fgtp_pass.plan import Plan, WeightCut, format_bytes
from fgtp_pass.planner import PlannedGraph, PlannedSite, check_requested, plan_graph
from fgtp_pass.rewrite import RewrittenGraph, idle_graph, rewrite
from fgtp_pass.step import IdleProgram, Step, TokenCounter, note_step, sites_number
from fgtp_pass.versions import check_torch, library_versions

log = logging.getLogger("fgtp_pass")

Compiled = Callable[..., Any]


def fgtp_backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
) -> Compiled:
    """Backend of `torch.compile`: shards what it finds in the graph over data-parallel ranks.

    options: see `fgtp_pass.config.Options`. With no component to shard, or a group of one rank,
    the graph goes to the inner backend as it came.

    Raises, before any weight is touched: ConfigError, DetectionError, InferenceOnlyError, and
    AgreementError when the ranks of the group do not agree.
    """
    check_torch()
    parameters = [v for v in example_inputs if isinstance(v, nn.Parameter)]
    try:
        parsed = parse_options(options)
        _check_inference(parameters)
    except FgtpError as error:
        if parameters:
            _report_early_failure(options, error)
        raise
    if not parameters or not _has_group(parsed):
        return compile_inner(parsed, gm, example_inputs)
    return _runtime(parsed).compile(gm, example_inputs)


def compile_inner(options: Options, gm: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
    """Compile with the inner backend."""
    backend = options.inner_backend
    extra: dict[str, Any] = {}
    if options.inner_options:
        by_name = backend == "inductor"
        extra = {"config_patches" if by_name else "options": options.inner_options}
    if isinstance(backend, str):
        backend = torch._dynamo.lookup_backend(backend)
    compiled: Compiled = backend(gm, list(inputs), **extra)
    return compiled


def _check_inference(parameters: Sequence[nn.Parameter]) -> None:
    if torch.is_grad_enabled() and any(p.requires_grad for p in parameters):
        raise InferenceOnlyError(
            "fgtp_pass is inference only, and gradients are enabled. Call the compiled model "
            "under torch.no_grad() or torch.inference_mode(), or freeze its parameters."
        )


def _has_group(options: Options) -> bool:
    """Whether there are other data-parallel ranks. Raises ConfigError if sizes need them."""
    requested = options.sizes.requested
    if not dist.is_initialized():
        if requested:
            raise ConfigError(
                f"{', '.join(requested)}: group sizes > 1 need a process group, and there is "
                "none. Call torch.distributed.init_process_group before the first step."
            )
        return False
    size = _data_parallel(options).size
    if size == 1:
        options.sizes.resolve(1, 1)  # raises for a size that exceeds the group
    return size > 1


def _data_parallel(options: Options) -> DataParallelGroup:
    """The data-parallel group. Its ranks meet when they first use it, whatever their options."""
    group = data_parallel_group(options.process_group, timedelta(seconds=options.timeout_seconds))
    ranks_on_smallest_host(group)
    return group


def _report_early_failure(options: Mapping[str, Any] | None, error: Exception) -> None:
    """Tell the group about options that this rank cannot even read."""
    if dist.is_initialized():
        given = {k: v for k, v in (options or {}).items() if k in ("process_group",)}
        group = _data_parallel(Options(**given))
        if group.size > 1:
            tell(wide_council(group), error)


# runtimes ---------------------------------------------------------------------------------------


class Runtime:
    """What compiled graphs with the same options and group share on this rank."""

    def __init__(self, options: Options, group: DataParallelGroup):
        self.options = options
        self.group = group
        self.wide = wide_council(group)
        with telling(self.wide):
            self._chooser = SizeChooser(options, group, self.wide, ranks_on_smallest_host(group))
        # ragged steps learn the number of rows to run at when they meet
        self._meets = options.check_tokens or options.tokens == "ragged"
        # the parameters that the ranks have agreed on, with the class they had then
        self._agreed: WeakIdKeyDictionary = WeakIdKeyDictionary()

    @property
    def sizes(self) -> Mapping[str, int]:
        """Group sizes by component, 1 for off."""
        return self._chooser.sizes

    @property
    def step_council(self) -> Council:
        """The ranks that this one runs in step with: the smallest group with all its groups."""
        size = math.lcm(*self.sizes.values())
        first = self.group.rank // size * size
        return Council(self.group.control_group(size), first, self.group.timeout.total_seconds())

    def compile(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
        """The callable for one graph; shards its weights if it is the first that reads them.

        The ranks meet before weights are touched and after, so that a rank which fails makes all
        of them raise and the weights are whole again. A graph that is only traced anew for
        another shape is compiled without a meeting: the other ranks need not trace it.
        """
        parameters = [v for v in inputs if isinstance(v, nn.Parameter)]
        if all(p in self._agreed and self._agreed[p] is type(p) for p in parameters):
            council = self.step_council if self._meets else None
            with telling(council):
                return self._compile(gm, inputs, self._rewrite(gm, inputs))
        with telling(self.wide):
            detection = detect(gm.graph, inputs, self.options.all_patterns)
            self._chooser.see(detection)
            planned = self._plan(gm, inputs, detection)
            check_requested(planned.plan, self.options.sizes.requested, self.options.allow_missing)
        self._agree(planned.plan)
        with telling(self.wide):
            written = self._rewrite(gm, inputs, planned)
        self.wide.meet(Act.SHARD, words="ready")
        whole = [p for p in parameters if not isinstance(p, weights.ShardedParameter)]
        try:
            with telling(self.wide):
                compiled = self._compile(gm, inputs, written)
            self.wide.meet(Act.SHARD, words="compiled")
        except Exception:
            for parameter in whole:
                if isinstance(parameter, weights.ShardedParameter):
                    weights.unshard_parameter(parameter)
            raise
        for parameter in parameters:
            self._agreed[parameter] = type(parameter)
        return compiled

    def _plan(
        self, gm: fx.GraphModule, inputs: Sequence[Any], detection: Detection | None = None
    ) -> PlannedGraph:
        """What to do with the graph, as far as it fits with what is sharded already."""
        detection = detection or detect(gm.graph, inputs, self.options.all_patterns)
        planned = plan_graph(detection, self.sizes, self.group.size)
        in_force = _in_force(gm, inputs)
        fits = tuple(site for site in planned.sites if _fits(site, in_force))
        chosen = tuple(self._chooser.chosen.values())
        plan = planned.plan.model_copy(update={"chosen": chosen})
        return PlannedGraph(plan, fits, detection)

    def _agree(self, plan: Plan) -> None:
        """Compare plans, options and library versions on all ranks; raises on every one."""
        self.wide.meet_equal(
            {
                "plan": plan.fingerprint,
                "sizes": self.sizes,
                "tokens": self.options.tokens,
                "check_tokens": self.options.check_tokens,
                **library_versions(),
            }
        )

    def _rewrite(
        self, gm: fx.GraphModule, inputs: Sequence[Any], planned: PlannedGraph | None = None
    ) -> "Written | None":
        """The rewritten graph, or None for a graph that stays as it is."""
        planned = planned or self._plan(gm, inputs)
        in_force = _in_force(gm, inputs)
        if not planned.sites and not in_force:
            return None
        sizes = {site.site.group_size for site in planned.sites}
        sizes |= {size for _, size in in_force.values()}
        groups = {size: self.group.component_group(size) for size in sorted(sizes)}
        for record in filter(None, map(weights.record_of, inputs)):
            if record.group != groups[record.group.size]:
                raise ConfigError(
                    f"{record.cut.fqn} is sharded over the ranks {record.group.ranks} by another "
                    "compiled model with another process_group. Call fgtp_pass.unshard first."
                )
        rewritten = rewrite(gm, planned, groups, in_force, self.options.tokens == "ragged")
        packed = packing.packable(rewritten.module.graph, rewritten.shards)
        packing.take_packed(rewritten.module, packed)
        return Written(planned, rewritten, groups, packed)

    def _compile(
        self, gm: fx.GraphModule, inputs: Sequence[Any], written: "Written | None"
    ) -> Compiled:
        """Shard what is whole, and compile the rewritten graph."""
        if written is None:
            return compile_inner(self.options, gm, inputs)
        planned, rewritten, groups = written.planned, written.rewritten, written.groups
        new = weights.shard_parameters(
            {inputs[i]: (cut, groups[size]) for i, (cut, size) in rewritten.shards.items()},
            planned.plan,
            {inputs[i] for i in written.packed},
        )
        if new and self.group.rank == 0:
            freed = format_bytes(planned.plan.bytes_saved_per_rank)
            log.info("sharded %d weights, %s freed per rank", new, freed)
            log.debug("%s", planned.plan)
        compiled, guards = self._compile_rewritten(inputs, written)
        counter = TokenCounter(gm.graph, planned.sites, guards)
        idle, taken = idle_graph(gm, planned, rewritten.gathered, groups, counter.classes)
        packing.take_packed(idle, [i for i, n in enumerate(taken) if n in written.packed])
        step = Step(
            compiled=compiled,
            shards=tuple(rewritten.shards),
            packed=written.packed,
            counter=counter,
            sites=sites_number(planned.sites),
            council=self.step_council if self._meets else None,
            ragged=self.options.tokens == "ragged",
            idle=IdleProgram(idle, taken),
        )
        note_step(step, (inputs[position] for position in rewritten.shards))
        return step

    def _compile_rewritten(
        self, inputs: Sequence[Any], written: "Written"
    ) -> tuple[Compiled, list[SizeGuard]]:
        """Compile with the shards, real and of static shape, in the place of the parameters."""
        given, rewritten = list(inputs), written.rewritten
        for position in rewritten.shards:
            record = weights.record_of(inputs[position])
            assert record is not None
            given[position] = record.for_graph(position in written.packed)
        static = [given[position] for position in rewritten.shards]
        rows = rewritten.row_examples
        with dynamo.new_inputs(static, rows, rewritten.row_inputs) as guards:
            compiled = compile_inner(self.options, rewritten.module, [*given, *rows])
        return compiled, guards


@dataclass(frozen=True, eq=False)
class Written:
    """A rewritten graph with its plan and the component groups that it names.

    packed: the positions of the shards that it takes packed.
    """

    planned: PlannedGraph
    rewritten: RewrittenGraph
    groups: Mapping[int, ComponentGroup]
    packed: frozenset[int]


def _fits(site: PlannedSite, in_force: Mapping[fx.Node, tuple[WeightCut, int]]) -> bool:
    """Whether the site's parameters are whole, or sharded as the site would shard them."""
    shared = [(cut, in_force[p]) for p, cut in site.cuts.items() if p in in_force]
    return all(cut.cuts_like(held) and size == site.site.group_size for cut, (held, size) in shared)


def _in_force(gm: fx.GraphModule, inputs: Sequence[Any]) -> dict[fx.Node, tuple[WeightCut, int]]:
    """The placeholders of parameters that are sharded already, and how."""
    found = {}
    for node, value in zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True):
        record = weights.record_of(value)
        if record is not None:
            found[node] = (record.cut, record.group.size)
    return found


_runtimes: list[Runtime] = []


def _runtime(options: Options) -> Runtime:
    """The runtime of these options in this process; making one is collective."""
    group = _data_parallel(options)
    for runtime in _runtimes:
        if runtime.group is group and runtime.options == options:
            return runtime
    _runtimes.append(Runtime(options, group))
    return _runtimes[-1]

"""rewrite: apply a plan to a graph through one Rewriter, which copies and never edits.

The copy is a valid graph with fake values at every step, so any backend can take it. Parameters
that are cut become placeholders of their shards, at the same position.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher

from fgtp_pass import dynamo
from fgtp_pass.collectives import ComponentGroup
from fgtp_pass.lowering import (
    SiteLowering,
    flatten_tokens,
    pad_tokens,
    rows_of,
)
from fgtp_pass.ops import OpKind, op_kind, value_of
from fgtp_pass.pattern import LookupStage, MatmulStage
from fgtp_pass.plan import WeightCut
from fgtp_pass.planner import PlannedGraph, PlannedSite
from fgtp_pass.shards import gather_weight

# A size of 0 or 1 is never dynamic for torch's compiler, so ragged sites run at 2 rows at least.
MINIMUM_ROWS = 2

TokenClass = tuple[str, int]  # (component, number): sites that see the same number of tokens


@dataclass(frozen=True, eq=False)
class RewrittenGraph:
    """A rewritten graph and how to call it.

    shards: position of each cut parameter among the inputs, with its cut and group size.
    gathered: the cut parameters that are gathered, because something else reads them too.
    row_inputs: the placeholders that follow the others, one per token class (ragged only): the
    number of rows that every rank of the group runs at, as the first size of a tensor [rows, 0].
    row_examples: example values for these.
    """

    module: fx.GraphModule
    shards: Mapping[int, tuple[WeightCut, int]]
    gathered: Mapping[fx.Node, tuple[WeightCut, int]]
    row_inputs: tuple[fx.Node, ...]
    row_examples: tuple[torch.Tensor, ...]


class Rewriter:
    """Writes the new graph: copies nodes of the old one and emits new ones with fake values."""

    def __init__(self, graph: fx.Graph):
        self.old = graph
        self.new = fx.Graph()
        self.env: dict[fx.Node, Any] = {}
        self._seen: dict[tuple[Any, str], Any] = {}
        self.fake_mode = dynamo.recorded_fake_mode(graph)

    def copy(self, node: fx.Node) -> None:
        self.env[node] = self._copy(node)

    def _copy(self, node: fx.Node) -> fx.Node:
        copied = self.new.node_copy(node, lambda n: self.env[n])
        dynamo.copy_source(node, copied)
        return copied

    def placeholder_like(self, node: fx.Node, shape: Sequence[int]) -> fx.Node:
        """A placeholder in the place of `node` for a tensor of another shape."""
        copied, value = self._copy(node), value_of(node)
        with self.fake_mode:
            copied.meta["example_value"] = torch.empty(
                tuple(shape), dtype=value.dtype, device=value.device
            )
        return copied

    def emit(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A new node with its fake value. Layers are alike, so each distinct call runs once."""
        node = self.new.call_function(target, args, kwargs)
        fakes = fx.map_arg((args, kwargs), value_of)
        key = (target, repr(fx.map_arg((args, kwargs), lambda n: _signature(value_of(n)))))
        if key not in self._seen:
            with self.fake_mode, enable_python_dispatcher(), torch.no_grad():
                self._seen[key] = target(*fakes[0], **fakes[1])
        node.meta["example_value"] = self._seen[key]
        return node


def _signature(value: Any) -> fx.Node | str:
    """All that the shape, type and place of a call's result can depend on."""
    if isinstance(value, torch.Tensor):
        return f"{tuple(value.shape)} {value.stride()} {value.dtype} {value.device}"
    return str(value)


@dynamo.paused_garbage_collection()
def rewrite(
    module: fx.GraphModule,
    planned: PlannedGraph,
    groups: Mapping[int, ComponentGroup],
    in_force: Mapping[fx.Node, tuple[WeightCut, int]],
    ragged: bool,
) -> RewrittenGraph:
    """The graph with every planned site lowered along its path. `module` itself is not changed.

    groups: this rank's component group by size. in_force: placeholders of parameters that are
    sharded already; where no site takes one, it is gathered in the graph. ragged: pad each site's
    tokens to a number of rows that comes in as an input.
    """
    rewriter = Rewriter(module.graph)
    cuts = dict(in_force)
    for site in planned.sites:
        for placeholder, cut in site.cuts.items():
            if cut.cut_dim is not None:
                cuts[placeholder] = (cut, site.site.group_size)
    replaced = _replaced_nodes(planned.sites)
    shards: dict[fx.Node, fx.Node] = {}
    positions: dict[int, tuple[WeightCut, int]] = {}
    for position, node in enumerate(module.graph.find_nodes(op="placeholder")):
        if node in cuts:
            cut, size = cuts[node]
            shards[node] = rewriter.placeholder_like(node, cut.shard_shape(size))
            positions[position] = cuts[node]
        else:
            rewriter.copy(node)
    rows = _row_inputs(rewriter, planned.sites) if ragged else {}
    gathered = {
        placeholder: cuts[placeholder]
        for placeholder in shards
        if any(user not in replaced for user in placeholder.users)
    }
    _gather(rewriter, shards, gathered, groups)
    outputs = {site.match.output: site for site in planned.sites}
    shape_reads = _shape_reads(planned.sites)
    for node in module.graph.nodes:
        if node.op == "placeholder":
            continue
        if node in outputs:
            site = outputs[node]
            group = groups[site.site.group_size]
            token_class = (site.site.component, site.site.tokens)
            row_input = rows[token_class][0] if ragged else None
            rewriter.env[node] = _lower(rewriter, site, group, shards, row_input)
        elif node not in replaced:
            if node in shape_reads:
                _stand_in_for_shape(rewriter, node.all_input_nodes[0], shape_reads[node])
            rewriter.copy(node)
    rewriter.new.lint()
    rewritten = fx.GraphModule(module, rewriter.new)
    rewritten.meta.update(module.meta)
    row_inputs, row_examples = zip(*rows.values(), strict=True) if rows else ((), ())
    return RewrittenGraph(rewritten, positions, gathered, row_inputs, row_examples)


def _replaced_nodes(sites: Sequence[PlannedSite]) -> set[fx.Node]:
    """The nodes that are not copied: the sites' own, and what only they use."""
    replaced: set[fx.Node] = set()
    for site in sites:
        replaced.add(site.match.output)
        for stage in site.match.stages:
            if isinstance(stage, MatmulStage):
                replaced.update(matmul.node for matmul in stage.matmuls)
                if stage.region is not None:
                    replaced.update(stage.region.ops, stage.region.alias)
    for site in sites:
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


def _gather(
    rewriter: Rewriter,
    shards: Mapping[fx.Node, fx.Node],
    gathered: Mapping[fx.Node, tuple[WeightCut, int]],
    groups: Mapping[int, ComponentGroup],
) -> None:
    """Where something that no pattern matched reads a cut parameter, gather it in the graph."""
    for placeholder, (cut, size) in gathered.items():
        warnings.warn(
            f"{cut.fqn} is sharded over {size} ranks, but a part of this graph that matches no "
            "component reads it: it is gathered there in every step, which costs its full "
            "size in communication and memory for that time.",
            stacklevel=2,
        )
        whole = gather_weight(rewriter.emit, groups[size], cut, shards[placeholder])
        rewriter.env[placeholder] = whole


def _row_inputs(
    rewriter: Rewriter, sites: Sequence[PlannedSite]
) -> dict[TokenClass, tuple[fx.Node, torch.Tensor]]:
    """One more input per token class: a tensor of shape [rows, 0], rows >= MINIMUM_ROWS.

    The example sizes are primes that no other size is likely to have, so that nothing in the
    graph is taken for equal to them.
    """
    classes = dict.fromkeys((site.site.component, site.site.tokens) for site in sites)
    made: dict[TokenClass, tuple[fx.Node, torch.Tensor]] = {}
    for number, token_class in enumerate(classes):
        name = f"fgtp_rows_{token_class[0]}_{token_class[1]}"
        example = torch.empty(int(sympy.nextprime(100_000 + 100 * number)), 0)
        node = dynamo.add_size_input(rewriter.new, rewriter.fake_mode, name, example)
        made[token_class] = (node, example)
    return made


def _lower(
    rewriter: Rewriter,
    site: PlannedSite,
    group: ComponentGroup,
    shards: Mapping[fx.Node, fx.Node],
    row_input: fx.Node | None,
) -> fx.Node:
    """Emit one site in place of its output node."""
    emit, match = rewriter.emit, site.match
    source: fx.Node = rewriter.env[match.source]
    x = flatten_tokens(emit, site, source)
    tokens = rows = _static_rows(x) or rows_of(emit, x)
    if row_input is not None:
        rows = rows_of(emit, row_input)
        is_ids = isinstance(match.stages[0], LookupStage)
        x = pad_tokens(emit, x, rows, None if is_ids else value_of(x).shape[-1])
    local = {p: shards.get(p, rewriter.env.get(p)) for p in site.cuts}
    result: fx.Node = SiteLowering(emit, site, group, local, rewriter.env).run(x, rows)
    if row_input is not None:
        result = emit(torch.narrow, result, 0, 0, tokens)
    wanted = value_of(match.output)
    leading = [_size_like(emit, size, site, source) for size in wanted.shape[:-1]]
    if wanted.dim() != 2 or not isinstance(match.stages[0], MatmulStage):
        result = emit(torch.reshape, result, (*leading, int(wanted.shape[-1])))
    return result


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


def _stand_in_for_shape(rewriter: Rewriter, inner: fx.Node, site: PlannedSite) -> None:
    """Let `inner`, which is no longer computed, be an expanded scalar of its shape."""
    emit, source = rewriter.emit, rewriter.env[site.match.source]
    sizes = [_size_like(emit, size, site, source) for size in value_of(inner).shape]
    scalar = emit(torch.Tensor.new_empty, source, (1,))
    rewriter.env[inner] = emit(torch.Tensor.expand, scalar, sizes)


def _size_like(emit: Any, size: Any, site: PlannedSite, source: fx.Node) -> Any:
    """A value equal to `size`, read from the site's source (`find_region` has checked that)."""
    if isinstance(size, int):
        return size
    for dim, known in enumerate(value_of(source).shape):
        if not isinstance(known, int) and known.node.expr == size.node.expr:
            return emit(torch.ops.aten.sym_size.int, source, dim)
    return rows_of(emit, flatten_tokens(emit, site, source))


def idle_graph(
    module: fx.GraphModule,
    planned: PlannedGraph,
    gathered: Mapping[fx.Node, tuple[WeightCut, int]],
    groups: Mapping[int, ComponentGroup],
    classes: Sequence[TokenClass],
) -> tuple[fx.GraphModule, list[int]]:
    """The collectives alone, sites on rows of zeros, and which inputs of `module` it takes.

    Its inputs are those, then a row count per token class.
    """
    graph = fx.Graph()
    env: dict[fx.Node, Any] = {}
    placeholders = module.graph.find_nodes(op="placeholder")
    needed = _idle_needs(planned.sites) | gathered.keys()
    for node in placeholders:
        if node in needed:
            env[node] = graph.node_copy(node)
    rows = {c: graph.placeholder(f"rows_{c[0]}_{c[1]}") for c in classes}
    for node in module.graph.nodes:
        if node in needed and node.op != "placeholder":
            env[node] = graph.node_copy(node, lambda n: env[n])

    def emit(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return graph.call_function(target, args, kwargs)

    for placeholder, (cut, size) in gathered.items():
        gather_weight(emit, groups[size], cut, env[placeholder])
    for site in planned.sites:
        count = rows[site.site.component, site.site.tokens]
        source = value_of(site.match.source)
        is_ids = isinstance(site.match.stages[0], LookupStage)
        shape = (count,) if is_ids else (count, int(source.shape[-1]))
        x = emit(torch.zeros, shape, dtype=source.dtype, device=source.device)
        SiteLowering(emit, site, groups[site.site.group_size], env, env).run(x, count)
    graph.output(())
    positions = [i for i, node in enumerate(placeholders) if node in needed]
    return fx.GraphModule(module, graph), positions


def _idle_needs(sites: Sequence[PlannedSite]) -> set[fx.Node]:
    """The sites' parameters, and the scalars that their regions read, with what makes these."""
    needed: set[fx.Node] = set()
    for site in sites:
        needed.update(site.cuts)
        for stage in site.match.stages:
            region = stage.region if isinstance(stage, MatmulStage) else None
            if region is None:
                continue
            inner = {up.node for up in region.ups} | set(region.ops) | set(region.alias)
            computed = [op for op in region.ops if op_kind(op) is OpKind.POINTWISE]
            stack = [n for op in computed for n in op.all_input_nodes if n not in inner]
            while stack:
                node = stack.pop()
                if node not in needed:
                    needed.add(node)
                    stack += node.all_input_nodes
    return needed

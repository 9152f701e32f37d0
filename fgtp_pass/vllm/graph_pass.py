"""The pass: marker ops -> the core's rewrite -> sharded matmuls and collectives.

Dynamo's graph holds marker ops of whole shapes. They are read as the matmuls and lookups that they
stand for, with parameters of full shape; the core detects, plans and rewrites that graph; and what
the rewritten graph applies to a shard becomes a plain matmul with the shard as an input of the
graph, or, where only vLLM's own kernel can take the shard, `fgtp::local_linear`.
"""

import logging
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from sympy import sympify
from torch import fx, nn

from fgtp_pass import dynamo
from fgtp_pass.algebra.placement import Cut
from fgtp_pass.detect.detect import detect
from fgtp_pass.detect.feed_forward import feed_forward
from fgtp_pass.detect.match import (
    Findings,
    LookupStage,
    Match,
    MatmulStage,
    Pattern,
    by_activation,
)
from fgtp_pass.errors import FgtpError
from fgtp_pass.graph.dataflow import GraphView
from fgtp_pass.graph.normal_form import ParamMatmul
from fgtp_pass.graph.op_kinds import value_of
from fgtp_pass.graph.region import NoRegion, find_region
from fgtp_pass.graph.size_expression import size_inputs
from fgtp_pass.graph.text import graph_text
from fgtp_pass.plan.plan import WeightCut
from fgtp_pass.plan.planner import PlannedGraph, plan_graph
from fgtp_pass.plan.prices import Prices
from fgtp_pass.rewrite.rewrite import rewrite
from fgtp_pass.vllm.by_tokens import ByTokens, another
from fgtp_pass.vllm.fused_norms import is_fused, joined_across, take_apart
from fgtp_pass.vllm.marker_ops import LAYERS, ShardedLayer

log = logging.getLogger("vllm.fgtp_pass")

_LINEAR = (torch.ops.fgtp.linear, torch.ops.fgtp.linear.default)
_EMBEDDING = (torch.ops.fgtp.embedding, torch.ops.fgtp.embedding.default)
_FFNS = ("mlp", "sharedexpert")
_OURS = "fgtp_"  # how the names of our placeholders begin


def with_pass(
    backend: Any, inductor_options: dict[str, Any], most_tokens: int
) -> Callable[..., Any]:
    """A Dynamo backend that rewrites marker ops, then calls the one that vLLM chose.

    inductor_options: vLLM's, which it hands to `torch.compile` only for a backend it can name.
    most_tokens: that a step may have.
    """

    def compile_one(rewritten: fx.GraphModule, example_inputs: Sequence[Any], inner: Any) -> Any:
        log.debug("the graph after the pass:\n%s", graph_text(rewritten.graph))
        if inner == "inductor":
            from torch._inductor.compile_fx import compile_fx

            return compile_fx(rewritten, list(example_inputs), config_patches=inductor_options)
        if isinstance(inner, str):
            inner = torch._dynamo.lookup_backend(inner)
        return inner(rewritten, list(example_inputs))

    def compile_rewritten(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        few, many = rewrite_markers(gm, example_inputs, most_tokens)
        compiled = compile_one(few, example_inputs, backend)
        if many is None:
            return compiled
        log.info(
            "steps of %d tokens and more gather weights in place of tokens: their graph is "
            "compiled beside that of the others",
            many.first,
        )
        for_many = compile_one(many.graph, example_inputs, another(backend))
        return ByTokens(compiled, for_many, many.first, many.position, many.dim)

    return compile_rewritten


@dataclass(frozen=True)
class ManyTokens:
    """The graph for steps that gather weights: those of `first` tokens and more.

    position, dim: the input, and its dim or None for an int, that is the number of tokens.
    """

    graph: fx.GraphModule
    first: int
    position: int
    dim: int | None


def rewrite_markers(
    gm: fx.GraphModule, example_inputs: Sequence[Any], most_tokens: int
) -> tuple[fx.GraphModule, ManyTokens | None]:
    """The graph with its marker ops lowered; the graph itself if it has none.

    Its inputs stay as they are: shards are inputs already. Also returns the graph for steps with
    many tokens, up to `most_tokens`, if these take other paths. Raises FgtpError for a marker that
    the core does not take.
    """
    if not any(node.target in _LINEAR + _EMBEDDING for node in gm.graph.nodes):
        return gm, None
    fused = [node for node in gm.graph.nodes if is_fused(node)]
    logical, planned = _plan(gm, example_inputs, fused)
    joined = joined_across(planned, logical.apart)
    if len(joined) < len(fused):
        logical, planned = _plan(gm, example_inputs, joined)
    taken = {placeholder for site in planned.sites for placeholder in site.cuts}
    for placeholder, layer in logical.layers.items():
        if placeholder not in taken:
            reasons = planned.detection.left_alone
            reason = reasons.get(layer.weight.fqn, "another site cuts its weight")
            raise FgtpError(f"{layer.weight.fqn} is sharded, but not in this graph: {reason}.")
    groups = {layer.group.size: layer.group for layer in logical.layers.values()}

    def written(paths: PlannedGraph) -> fx.GraphModule:
        return logical.with_kernels(rewrite(logical.module, paths, groups, {}, False).module)

    few = replace(planned, ranges={})
    return written(few), _many_tokens(gm, planned, few, most_tokens, written)


def _many_tokens(
    gm: fx.GraphModule,
    planned: PlannedGraph,
    few: PlannedGraph,
    most_tokens: int,
    written: Callable[[PlannedGraph], fx.GraphModule],
) -> ManyTokens | None:
    """The graph along the paths for `most_tokens`, from where it sends fewer bytes on than `few`.

    All sites of vLLM's graph see the tokens of the step, so one number says which of two runs. More
    than two would take their time to compile.
    """
    tokens = {sympify(site.match.tokens) for site in planned.sites}
    where = size_inputs(gm.graph)
    if len(tokens) != 1 or not tokens & where.keys():
        return None  # the graph is for one number, or its sites see several
    components = {site.match.component for site in planned.sites}
    many = planned.at(planned.program(dict.fromkeys(components, most_tokens)))
    sizes = {site: site.site.group_size for site in many.sites}
    gathered = sum(site.path.gathered_bytes * (k - 1) / k for site, k in sizes.items())
    by_few, by_many = (sum(s.path.bytes_per_token for s in one.sites) for one in (few, many))
    saved = by_few - by_many  # for each token
    if not gathered or saved * most_tokens <= gathered:
        return None
    position, dim = where[tokens.pop()]
    return ManyTokens(written(many), math.floor(gathered / saved) + 1, position, dim)


def _plan(
    gm: fx.GraphModule, example_inputs: Sequence[Any], apart: Collection[fx.Node]
) -> "tuple[_Logical, PlannedGraph]":
    """A graph's whole matmuls and the paths of its sites, with some fused norms taken apart."""
    logical = _Logical(gm, apart)
    detection = detect(
        logical.module.graph, logical.inputs(example_inputs), logical.patterns(), logical.names
    )
    sizes = {layer.component: layer.group.size for layer in logical.layers.values()}
    # what only vLLM's kernels can read is not gathered
    prices = Prices(by_range=True, gatherable=lambda match: logical.plain(match.weights))
    return logical, plan_graph(detection, sizes, max(sizes.values()), prices=prices)


class _Logical:
    """A graph with the whole matmuls and lookups that its markers stand for.

    layers: by placeholder of a whole weight, the layer. Where a marker does not carry its weight,
    the placeholder is one of ours, after the graph's own. apart: by the add, the fused norm that
    was taken apart into it and a norm.
    """

    def __init__(self, gm: fx.GraphModule, apart: Collection[fx.Node]):
        graph = fx.Graph()
        self.module = fx.GraphModule(gm, graph)
        self.layers: dict[fx.Node, ShardedLayer] = {}
        self._whole: dict[fx.Node, torch.Tensor] = {}
        self._mode = dynamo.recorded_fake_mode(gm.graph)
        self.apart: dict[fx.Node, fx.Node] = {}
        env: dict[fx.Node, fx.Node] = {}
        placeholders = gm.graph.find_nodes(op="placeholder")
        for node in placeholders:
            env[node] = graph.node_copy(node)
            dynamo.copy_source(node, env[node])
        markers = [node for node in gm.graph.nodes if node.target in _LINEAR + _EMBEDDING]
        weights = {node: self._add_weight(graph, node, env) for node in markers}
        for node in gm.graph.nodes:
            if node in env:
                continue
            if node in apart:
                self.apart[take_apart(graph, node, env)] = node
                continue
            if node not in weights:
                env[node] = graph.node_copy(node, lambda n: env[n])
                continue
            source: fx.Node = env[node.args[0]]
            if node.target in _EMBEDDING:
                new = graph.call_function(F.embedding, (source, weights[node]))
            else:
                bias = env[node.args[2]] if node.args[2] is not None else None
                new = graph.call_function(F.linear, (source, weights[node], bias))
            new.meta = dict(node.meta)
            env[node] = new
        graph.lint()

    def _add_weight(self, graph: fx.Graph, marker: fx.Node, env: dict[fx.Node, fx.Node]) -> fx.Node:
        is_lookup = marker.target in _EMBEDDING
        layer = LAYERS[str(marker.args[2 if is_lookup else 3])]
        given = marker.args[1]
        if isinstance(given, fx.Node):
            placeholder = env[given]
        else:
            placeholder = graph.placeholder(_OURS + layer.name.replace(".", "_"))
        self._make_whole(placeholder, layer.weight, value_of(marker).dtype)
        self.layers[placeholder] = layer
        bias = None if is_lookup else marker.args[2]
        if isinstance(bias, fx.Node) and layer.bias is not None:
            self._make_whole(env[bias], layer.bias, value_of(bias).dtype)
        return placeholder

    def _make_whole(self, placeholder: fx.Node, cut: WeightCut, dtype: torch.dtype) -> None:
        device = next(self._devices())
        with self._mode:
            value = torch.empty(cut.shape, dtype=dtype, device=device)
        placeholder.meta["example_value"] = value
        self._whole[placeholder] = value

    def plain(self, weights: Iterable[fx.Node]) -> bool:
        """Whether the graph is given the shards of all of these."""
        return not any(str(weight.target).startswith(_OURS) for weight in weights)

    def _devices(self) -> Iterator[torch.device]:
        for node in self.module.graph.nodes:
            value = value_of(node)
            if isinstance(value, torch.Tensor):
                yield value.device

    @property
    def names(self) -> dict[int, str]:
        """The names of the whole parameters that `inputs` makes, by id."""
        return {id(self._parameters[p]): layer.weight.fqn for p, layer in self.layers.items()}

    def inputs(self, example_inputs: Sequence[Any]) -> list[Any]:
        """Example values with whole parameters, on the meta device, in the place of shards."""
        self._parameters = {
            node: nn.Parameter(torch.empty(v.shape, dtype=v.dtype, device="meta"), False)
            for node, v in self._whole.items()
        }
        placeholders = self.module.graph.find_nodes(op="placeholder")
        given = [*example_inputs, *([None] * (len(placeholders) - len(example_inputs)))]
        return [self._parameters.get(p, v) for p, v in zip(placeholders, given, strict=True)]

    # patterns ---------------------------------------------------------------------------------

    def patterns(self) -> tuple[Pattern, ...]:
        """What was planned is a site; only how an FFN is joined is read from the graph."""
        return tuple(
            Pattern(component, "", find)
            for component, find in (
                ("ffn", self._ffns),
                ("projection", self._projections),
                ("embedding", self._lookups),
            )
        )

    def _layer(self, matmul: ParamMatmul) -> ShardedLayer | None:
        return self.layers.get(matmul.weight.placeholder) if matmul.weight is not None else None

    def _ffns(self, view: GraphView, found: Findings) -> Iterator[Match]:
        for down in view.matmuls:
            layer = self._layer(down)
            if layer is None or layer.component not in _FFNS or layer.cut is not Cut.IN:
                continue
            region = find_region(view, down)
            if isinstance(region, NoRegion):
                log.warning(
                    "%s: %s, so its FFN moves whole activations; it is right, but slower.",
                    layer.weight.fqn,
                    region.reason,
                )
                continue
            blocks = tuple(len(region.blocks[up.node]) for up in region.ups)
            ups = [self._layer(up) for up in region.ups]
            if all(
                up is not None and up.weight.blocks == n for up, n in zip(ups, blocks, strict=True)
            ):
                yield feed_forward(layer.component, region, down)

    def _projections(self, view: GraphView, found: Findings) -> Iterator[Match]:
        """Those that feed attention and read one activation share their collectives."""
        layers = {
            matmul: layer
            for matmul in view.matmuls
            if (layer := self._layer(matmul)) and matmul.node not in found.claimed
        }
        qkv = [matmul for matmul, layer in layers.items() if layer.component == "qkv"]
        alone = ([matmul] for matmul in layers if matmul not in qkv)
        for matmuls in (*by_activation(view, qkv), *alone):
            first, blocks = layers[matmuls[0]], tuple(layers[m].weight.blocks for m in matmuls)
            stage = MatmulStage(tuple(matmuls), (first.cut,), blocks)
            outputs = tuple(matmul.node for matmul in matmuls)
            yield Match(first.component, (stage,), matmuls[0].input, outputs)

    def _lookups(self, view: GraphView, found: Findings) -> Iterator[Match]:
        for lookup in view.lookups:
            layer = self.layers.get(lookup.weight.placeholder)
            if layer is not None:
                yield Match(layer.component, (LookupStage(lookup),), lookup.ids, (lookup.node,))

    # kernels ----------------------------------------------------------------------------------

    def with_kernels(self, module: fx.GraphModule) -> fx.GraphModule:
        """The rewritten graph without the placeholders that are ours: vLLM's kernels hold those."""
        ours = {_OURS + layer.name.replace(".", "_"): layer for layer in self.layers.values()}
        for placeholder in module.graph.find_nodes(op="placeholder"):
            layer = ours.get(str(placeholder.target))
            if layer is None:
                continue
            features = int(value_of(placeholder).shape[0])
            for user in list(placeholder.users):
                x, _, bias = user.args
                with module.graph.inserting_before(user):
                    new = module.graph.call_function(
                        torch.ops.fgtp.local_linear.default, (x, bias, layer.name, features)
                    )
                new.meta = dict(user.meta)
                user.replace_all_uses_with(new)
                module.graph.erase_node(user)
            module.graph.erase_node(placeholder)
        module.graph.lint()
        module.recompile()
        return module

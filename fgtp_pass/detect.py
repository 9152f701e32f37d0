"""detect: run the patterns over a graph; give each parameter a site or a reason to stay whole."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx
from torch.amp.autocast_mode import _enter_autocast

from fgtp_pass.dataflow import GraphView, Reach
from fgtp_pass.dynamo import paused_garbage_collection
from fgtp_pass.normal_form import ParamMatmul
from fgtp_pass.ops import OpKind, op_kind, value_of
from fgtp_pass.pattern import Findings, Match, Pattern, Refusal
from fgtp_pass.weights import ShardedParameter


@dataclass(frozen=True)
class Detection:
    """The sites of a graph in graph order, and the reason for every parameter in none of them."""

    view: GraphView
    matches: tuple[Match, ...]
    left_alone: dict[str, str]


@paused_garbage_collection()
def detect(
    graph: fx.Graph,
    example_inputs: Sequence[object],
    patterns: Sequence[Pattern],
    names: Mapping[int, str] | None = None,
) -> Detection:
    """Find the sites of all patterns. Reads the graph, changes nothing.

    example_inputs: the values that Dynamo hands to a backend, one per placeholder; they tell
    parameters from other inputs. names: the parameters' names by id, where they are known; else
    they are Dynamo's, relative to the module whose code it compiles.
    """
    view = GraphView(graph, *_split_inputs(graph, example_inputs, names or {}))
    found, refused = Findings(), dict[fx.Node, str]()
    autocast = any(node.target is _enter_autocast for node in graph.nodes)
    special = _special_parameters(graph, example_inputs)
    for _, written in view.writes:
        special[view.memory(written)] = "the graph changes it in place"
    for pattern in patterns:
        for result in pattern.find(view, found):
            if isinstance(result, Refusal):
                refused.setdefault(result.placeholder, result.reason)
                continue
            reason = next((special[w] for w in result.parameters if w in special), "")
            if autocast:
                reason = "the graph switches autocast, so its dtypes are not known"
            if reason:
                refused.update((w, reason) for w in result.parameters)
            else:
                found.add(result)
    matches = sorted(found.matches, key=lambda match: view.order[match.output])
    used = {placeholder for match in matches for placeholder in match.parameters}
    left_alone = {
        fqn: refused.get(placeholder) or _reason(view, placeholder)
        for placeholder, fqn in view.parameters.items()
        if placeholder not in used
    }
    return Detection(view, tuple(matches), left_alone)


# inputs -----------------------------------------------------------------------------------------

_MODULE_STEP = re.compile(r"_modules\['([^']+)'\]|_(parameters|buffers)\['([^']+)'\]")


def fqn_of_source(source: str) -> tuple[str, str]:
    """("model.norm.weight", "parameters") of Dynamo's source expression for an input.

    Both are "" for an input that is no part of a module.
    """
    path, kind = [], ""
    for module, holder, leaf in _MODULE_STEP.findall(source):
        path.append(module or leaf)
        kind = holder or kind
    return (".".join(path), kind) if kind else ("", "")


def _split_inputs(
    graph: fx.Graph, example_inputs: Sequence[object], names: Mapping[int, str]
) -> tuple[dict[fx.Node, str], set[fx.Node]]:
    """The placeholders of parameters with their names, and those of buffers."""
    parameters: dict[fx.Node, str] = {}
    buffers: set[fx.Node] = set()
    placeholders = graph.find_nodes(op="placeholder")
    for node, value in zip(placeholders, example_inputs, strict=True):
        source = getattr(node, "_dynamo_source", None)
        fqn, kind = fqn_of_source(source.name) if source is not None else ("", "")
        if isinstance(value, torch.nn.Parameter):
            parameters[node] = names.get(id(value)) or fqn or str(node.target)
        elif kind:
            buffers.add(node)
    return parameters, buffers


def _special_parameters(graph: fx.Graph, example_inputs: Sequence[object]) -> dict[fx.Node, str]:
    """Parameters that are tensor subclasses (DTensor, quantised weights), with that reason."""
    placeholders = graph.find_nodes(op="placeholder")
    return {
        node: f"its parameter is a {type(value).__name__}, not a plain one"
        for node, value in zip(placeholders, example_inputs, strict=True)
        if isinstance(value, torch.nn.Parameter)
        and type(value) not in (torch.nn.Parameter, ShardedParameter)
    }


# reasons ----------------------------------------------------------------------------------------


def _reason(view: GraphView, placeholder: fx.Node) -> str:
    """Why no pattern asked for this parameter, from how the graph uses it."""
    dims = value_of(placeholder).dim()
    if dims == 1:
        owner = next((m for m in view.matmuls if m.bias is placeholder), None)
        if owner is not None:
            return f"a bias: {_matmul_reason(view, owner)}"
        return "a vector of one value per feature (a norm, a scale or a bias)"
    if dims > 2:
        return f"a parameter of {dims} dims (stacked experts, a convolution): no component's weight"
    for matmul in view.matmuls:
        if matmul.weight is not None and matmul.weight.placeholder is placeholder:
            return _matmul_reason(view, matmul)
    if not placeholder.users:
        return "the graph does not use it"
    if any(op_kind(user) is OpKind.LOOKUP for user in placeholder.users):
        return "its lookup is not one of a plain table"
    return "no matmul or lookup uses it directly"


def _matmul_reason(view: GraphView, matmul: ParamMatmul) -> str:
    reach = view.reach[matmul.node]
    if matmul.node in view.routers:
        return "a router: experts or tokens are chosen from its result"
    if Reach.ATTENTION in reach:
        return "feeds an attention core (q, k or v): it is cut with the heads, not over tokens"
    if any(view.facts[other.input].origin is matmul.node for other in view.matmuls):
        return "feeds only another projection: the inner half of a low-rank pair or transform"
    return "no component's definition fits its place in the graph"

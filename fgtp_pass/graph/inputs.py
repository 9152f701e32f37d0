"""Which inputs of a graph are parameters and buffers, and their names."""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

# an attribute of classes of parameters that are, to a graph, plain ones
STANDS_FOR_PLAIN = "stands_for_plain_parameter"

_OF_PLAIN_STORAGE = (torch.Tensor, torch.nn.Parameter, FakeTensor)

_OF_THE_MODEL = re.compile(r"L\['self'\]\.|G\[")
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


def split_inputs(
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


def numbers_of_the_model(graph: fx.Graph, example_inputs: Sequence[object]) -> dict[fx.Node, str]:
    """The inputs that are numbers of the model's own, an attribute or a global, with their values.

    Where all is dynamic, Dynamo makes these inputs, as 0-d tensors; a caller's are named otherwise.
    """
    found: dict[fx.Node, str] = {}
    for node, value in zip(graph.find_nodes(op="placeholder"), example_inputs, strict=True):
        source = getattr(node, "_dynamo_source", None)
        if source is None or not _OF_THE_MODEL.match(source.name) or fqn_of_source(source.name)[1]:
            continue
        if type(value) is torch.Tensor and value.dim() == 0 and not value.is_meta:
            found[node] = f"{source.name} = {value.item()}"
    return found


def aliased_inputs(graph: fx.Graph, example_inputs: Sequence[object]) -> dict[fx.Node, fx.Node]:
    """Inputs whose memory is that of an earlier one (buffers that are views of one tensor)."""
    first: dict[int, fx.Node] = {}
    aliases: dict[fx.Node, fx.Node] = {}
    for node, value in zip(graph.find_nodes(op="placeholder"), example_inputs, strict=True):
        if isinstance(value, torch.Tensor) and type(value) in _OF_PLAIN_STORAGE:
            storage = value.untyped_storage()._cdata
            if first.setdefault(storage, node) is not node:
                aliases[node] = first[storage]
    return aliases


def special_parameters(graph: fx.Graph, example_inputs: Sequence[object]) -> dict[fx.Node, str]:
    """Parameters that are tensor subclasses (DTensor, quantised weights), with that reason."""
    placeholders = graph.find_nodes(op="placeholder")
    return {
        node: f"its parameter is a {type(value).__name__}, not a plain one"
        for node, value in zip(placeholders, example_inputs, strict=True)
        if isinstance(value, torch.nn.Parameter)
        and type(value) is not torch.nn.Parameter
        and not getattr(type(value), STANDS_FOR_PLAIN, False)
    }

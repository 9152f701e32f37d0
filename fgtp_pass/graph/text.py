"""Graphs as text that reads well and stays the same from run to run."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fgtp_pass.graph.inputs import fqn_of_source
from fgtp_pass.graph.op_kinds import op_name, value_of


def graph_text(graph: fx.Graph) -> str:
    """One line per node: `name: dtype[shape] = op(arguments)`, parameters by their names."""
    names: dict[fx.Node, str] = {}
    lines = []
    for node in graph.nodes:
        names[node] = _name(node, len(names))
        if node.op == "placeholder":
            lines.append(f"input {names[node]}: {_type(value_of(node))}")
        elif node.op == "output":
            lines.append(f"return {_arguments(node.args, {}, names)}")
        else:
            call = f"{_target(node)}({_arguments(node.args, node.kwargs, names)})"
            lines.append(f"{names[node]}: {_type(value_of(node))} = {call}")
    return "\n".join(lines) + "\n"


def _name(node: fx.Node, number: int) -> str:
    if node.op == "placeholder":
        source = getattr(node, "_dynamo_source", None)
        return (fqn_of_source(source.name)[0] if source is not None else "") or str(node.target)
    return f"%{number}"


def _type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        dims = ", ".join(str(size) for size in value.shape)
        return f"{str(value.dtype).removeprefix('torch.')}[{dims}]"
    return type(value).__name__


def _target(node: fx.Node) -> str:
    if node.op == "call_method":
        return f".{node.target}"
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name
    return getattr(node.target, "__name__", str(node.target))


def _arguments(args: Any, kwargs: Any, names: dict[fx.Node, str]) -> str:
    given = [_argument(a, names) for a in args]
    given += [f"{key}={_argument(a, names)}" for key, a in kwargs.items()]
    return ", ".join(given)


def _argument(value: Any, names: dict[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        return names[value]
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(_argument(v, names) for v in value)}]"
    if isinstance(value, slice):
        parts = (value.start, value.stop, value.step)
        return ":".join(
            "" if p is None else _argument(p, names) for p in parts[: 2 + (parts[2] is not None)]
        )
    return str(value)


def ops_text(ops: Sequence[fx.Node]) -> str:
    """One line per op, without shapes: equal where the ops do the same to what they are given.

    Whatever their spelling: Dynamo writes `a + b` as a function, or another time as a method.
    """
    numbers = {node: _Bare(f"%{number}") for number, node in enumerate(ops)}
    lines = []
    for node in ops:
        given = (node.args, node.kwargs)
        args, kwargs = fx.map_arg(given, lambda n: numbers.get(n, _Bare("in")))
        lines.append(f"{op_name(node) or _target(node)}{args}{kwargs or ''}")
    return "\n".join(lines)


class _Bare(str):
    """A name that prints without quotes."""

    __slots__ = ()
    __repr__ = str.__str__

"""Sizes as expressions in the sizes of inputs, so that equal ones are known to be equal."""

import functools
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._sympy.functions import FloorDiv


def size_expression(size: int | torch.SymInt) -> Any:
    """An int, or an expression in which what divides evenly is divided.

    Where two sizes of an input are one symbol (dynamic, batch == length), a view that torch sees as
    s**2 // s would else be another size than s.
    """
    return _divided(size.node.expr) if isinstance(size, torch.SymInt) else size


@functools.lru_cache(4096)
def _divided(expression: sympy.Basic) -> Any:
    return expression.replace(FloorDiv, _quotient)


def _quotient(numerator: sympy.Basic, denominator: sympy.Basic) -> sympy.Basic:
    quotient = sympy.cancel(numerator / denominator)
    symbols = quotient.free_symbols
    if symbols and quotient.is_polynomial(*symbols):
        coefficients = sympy.Poly(quotient, *symbols).coeffs()
        if all(coefficient.is_integer for coefficient in coefficients):
            return quotient
    return FloorDiv(numerator, denominator)


def size_inputs(graph: fx.Graph) -> dict[sympy.Symbol, tuple[int, int | None]]:
    """Where each symbol can be read: (input, dim), or (input, None) for an input that is an int."""
    where: dict[sympy.Symbol, tuple[int, int | None]] = {}
    for position, node in enumerate(graph.find_nodes(op="placeholder")):
        value = node.meta.get("example_value")
        if isinstance(value, torch.SymInt):
            where.setdefault(value.node.expr, (position, None))
        elif isinstance(value, torch.Tensor):
            for dim, size in enumerate(value.shape):
                if isinstance(size, torch.SymInt):
                    where.setdefault(size.node.expr, (position, dim))
    return where


def traced_sizes(graph: fx.Graph) -> dict[sympy.Symbol, sympy.Integer]:
    """What the sizes of the inputs were when the graph was traced; asking guards nothing.

    1 for one that only the data know.
    """
    placeholders = graph.find_nodes(op="placeholder")
    found = {}
    for symbol, (position, dim) in size_inputs(graph).items():
        value = placeholders[position].meta["example_value"]
        size = (value if dim is None else value.shape[dim]).node
        found[symbol] = sympy.Integer(size.hint if size.has_hint() else 1)
    return found

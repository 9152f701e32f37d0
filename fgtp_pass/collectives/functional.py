"""Each collective on tensors, once, on dim 0: written into a graph or run at once."""

from collections.abc import Callable
from typing import Any

import torch

from fgtp_pass.collectives.groups import ComponentGroup

# Gives the value of `target(*args)`: a node where a graph is written, a tensor where it is run.
Emit = Callable[..., Any]


_FUNCTIONAL = torch.ops._c10d_functional


def all_gather(emit: Emit, group: ComponentGroup, x: Any) -> Any:
    """Own [n, ...] -> All [k*n, ...]."""
    return wait(emit, start_all_gather(emit, group, x))


def start_all_gather(emit: Emit, group: ComponentGroup, x: Any) -> Any:
    """Begin an all_gather; `wait` gives its result."""
    return emit(_FUNCTIONAL.all_gather_into_tensor.default, x, group.size, group.name)


def all_to_all(emit: Emit, group: ComponentGroup, x: Any, rows: Any) -> Any:
    """[k*rows, ...] -> [k*rows, ...]: block i goes to rank i, block i of the result is from it."""
    splits = [rows] * group.size
    moved = emit(_FUNCTIONAL.all_to_all_single.default, x, splits, splits, group.name)
    return wait(emit, moved)


def reduce_scatter(emit: Emit, group: ComponentGroup, x: Any, rows: Any, features: int) -> Any:
    """Sum [k*rows, features] -> Own [rows, features].

    Over gloo an all_to_all and a local sum are faster than its reduce_scatter
    (benchmarks/README.md), and the local sum accumulates half precision in fp32.
    """
    if group.sums_by_exchange:
        parts = all_to_all(emit, group, x, rows)
        stacked = emit(torch.reshape, parts, (group.size, rows, features))
        return emit(torch.sum, stacked, 0)
    name = _FUNCTIONAL.reduce_scatter_tensor.default
    return wait(emit, emit(name, x, "sum", group.size, group.name))


def all_reduce(emit: Emit, group: ComponentGroup, x: Any, rows: Any, features: int) -> Any:
    """Sum [rows, features] -> All [rows, features].

    Between two ranks over gloo an all_gather and a local sum send as many bytes, and sooner.
    """
    if group.sums_by_exchange and group.size == 2:
        parts = emit(torch.reshape, all_gather(emit, group, x), (2, rows, features))
        return emit(torch.sum, parts, 0)
    return wait(emit, emit(_FUNCTIONAL.all_reduce.default, x, "sum", group.name))


def wait(emit: Emit, x: Any) -> Any:
    """What a collective that was begun gives."""
    return emit(_FUNCTIONAL.wait_tensor.default, x)

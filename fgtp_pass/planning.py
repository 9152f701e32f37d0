"""Plans without ranks: trace a model, on any device, and show what the backend would do."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from fgtp_pass import dynamo
from fgtp_pass.collectives import ComponentGroup
from fgtp_pass.config import parse_sizes
from fgtp_pass.detect import detect
from fgtp_pass.errors import DetectionError
from fgtp_pass.graph_text import graph_text
from fgtp_pass.pattern import Pattern
from fgtp_pass.patterns import BUILTIN
from fgtp_pass.plan import Plan, merge
from fgtp_pass.planner import PlannedGraph, check_requested, plan_graph
from fgtp_pass.rewrite import rewrite


def make_plan(
    model: nn.Module | Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    finegrained_tp_config: Mapping[str, Any] | None = None,
    data_parallel_size: int,
    ranks_per_host: int | None = None,
    allow_missing: Sequence[str] = (),
    patterns: Sequence[Pattern] = (),
) -> Plan:
    """The plan that the backend would put into force on `model`, without any process group.

    Traces one call of the model with `args` and `kwargs`, so a model on `torch.device("meta")`
    costs no memory. ranks_per_host: what "auto" may use; by default all ranks.

    Raises ConfigError and DetectionError as the backend does.
    """
    asked = parse_sizes(finegrained_tp_config, (*BUILTIN, *patterns))
    sizes = asked.resolve(data_parallel_size, ranks_per_host or data_parallel_size)
    traced = _trace(model, args, kwargs, sizes, data_parallel_size, patterns)
    plan = merge(planned.plan for _, planned in traced)
    assert plan is not None
    check_requested(plan, asked.requested, allow_missing)
    return plan


@dataclass(frozen=True)
class GraphSnapshot:
    """One graph of a model as text, as Dynamo traced it and as one rank will run it.

    collectives: how often each collective runs in one forward.
    """

    before: str
    after: str
    collectives: Mapping[str, int]


def snapshot_graphs(
    model: nn.Module | Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    finegrained_tp_config: Mapping[str, Any] | None = None,
    data_parallel_size: int,
    rank: int = 0,
    tokens: str = "equal",
    patterns: Sequence[Pattern] = (),
) -> list[GraphSnapshot]:
    """The graphs of one call before and after the pass, to look at or to pin in a test.

    Shows the canonical collectives; over gloo the backend does a reduce_scatter as an all_to_all
    and a sum. rank: the data-parallel rank whose graph is shown. Raises as `make_plan` does.
    """
    asked = parse_sizes(finegrained_tp_config, (*BUILTIN, *patterns))
    sizes = asked.resolve(data_parallel_size, data_parallel_size)
    snapshots = []
    for module, planned in _trace(model, args, kwargs, sizes, data_parallel_size, patterns):
        groups = {k: _group_of(rank, k) for k in set(sizes.values())}
        rewritten = rewrite(module, planned, groups, {}, ragged=tokens == "ragged")
        snapshots.append(
            GraphSnapshot(
                graph_text(module.graph),
                graph_text(rewritten.module.graph),
                Counter(c for site in planned.plan.sites for c in site.collectives),
            )
        )
    return snapshots


def _group_of(rank: int, size: int) -> ComponentGroup:
    first = rank // size * size
    return ComponentGroup(
        f"ranks_{first}_to_{first + size - 1}",
        size,
        rank - first,
        tuple(range(first, first + size)),
    )


def _trace(
    model: nn.Module | Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    sizes: Mapping[str, int],
    data_parallel_size: int,
    patterns: Sequence[Pattern],
) -> list[tuple[fx.GraphModule, PlannedGraph]]:
    """The graphs with parameters that one call of the model makes, and their plans."""
    traced: list[tuple[fx.GraphModule, PlannedGraph]] = []
    named = model.named_parameters() if isinstance(model, nn.Module) else ()
    names = {id(parameter): name for name, parameter in named}
    seen: set[tuple[int, ...]] = set()

    def plan(gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
        parameters = tuple(id(v) for v in inputs if isinstance(v, nn.Parameter))
        if not parameters or (id(gm), *parameters) in seen:
            return
        seen.add((id(gm), *parameters))
        detection = detect(gm.graph, inputs, (*BUILTIN, *patterns), names)
        traced.append((gm, plan_graph(detection, sizes, data_parallel_size)))

    def record(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        def run(*inputs: Any) -> Any:
            plan(gm, inputs)  # layers that run the same code may share a graph
            return gm.forward(*inputs)

        return run

    with torch.no_grad(), dynamo.meta_constants():
        torch.compile(model, backend=record)(*args, **(kwargs or {}))
    if not traced:
        raise DetectionError(
            "Dynamo made no graph with parameters of this call. Plan a model that is not "
            "compiled yet, and call it as you would in production."
        )
    return traced

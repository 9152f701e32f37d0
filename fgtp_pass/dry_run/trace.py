"""The graphs that one call of a model makes, and their plans, without ranks."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from fgtp_pass import dynamo
from fgtp_pass.detect.detect import detect
from fgtp_pass.detect.match import Pattern
from fgtp_pass.errors import DetectionError
from fgtp_pass.patterns import with_own
from fgtp_pass.plan.planner import PlannedGraph, plan_graph
from fgtp_pass.plan.prices import Prices


def trace(
    model: nn.Module | Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    sizes: Mapping[str, int],
    data_parallel_size: int,
    patterns: Sequence[Pattern],
    joins: bool = True,
    prices: Prices | None = None,
) -> list[tuple[fx.GraphModule, PlannedGraph]]:
    """The graphs with parameters that one call of the model makes, and their plans.

    joins, prices: as `plan_graph` takes them; by default paths are for any number of tokens.
    """
    traced: list[tuple[fx.GraphModule, PlannedGraph]] = []
    named = model.named_parameters() if isinstance(model, nn.Module) else ()
    names = {id(parameter): name for name, parameter in named}
    seen: set[tuple[int, ...]] = set()

    def plan(gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
        parameters = tuple(id(v) for v in inputs if isinstance(v, nn.Parameter))
        if not parameters or (id(gm), *parameters) in seen:
            return
        seen.add((id(gm), *parameters))
        detection = detect(gm.graph, inputs, with_own(patterns), names)
        by = prices or Prices(by_range=True)
        planned = plan_graph(detection, sizes, data_parallel_size, prices=by, joins=joins)
        traced.append((gm, planned))

    def record(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        def run(*inputs: Any) -> Any:
            plan(gm, inputs)  # layers that run the same code may share a graph
            return gm.forward(*inputs)

        return run

    with torch.no_grad(), dynamo.meta_constants(), dynamo.no_recompile_limit():
        torch.compile(model, backend=record)(*args, **(kwargs or {}))
    if not traced:
        raise DetectionError(
            "Dynamo made no graph with parameters of this call. Plan a model that is not "
            "compiled yet, and call it as you would in production."
        )
    return traced

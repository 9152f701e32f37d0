"""Plans without ranks: trace a model, on any device, and plan what the backend would do."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from fgtp_pass.config import parse_sizes
from fgtp_pass.detect import detect
from fgtp_pass.errors import DetectionError
from fgtp_pass.pattern import Pattern
from fgtp_pass.patterns import BUILTIN
from fgtp_pass.plan import Plan, merge
from fgtp_pass.planner import check_requested, plan_graph


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
    every_pattern = (*BUILTIN, *patterns)
    asked = parse_sizes(finegrained_tp_config, every_pattern)
    sizes = asked.resolve(data_parallel_size, ranks_per_host or data_parallel_size)
    plans: list[Plan] = []

    def record(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        detection = detect(gm.graph, example_inputs, every_pattern)
        if detection.view.parameters:
            plans.append(plan_graph(detection, sizes, data_parallel_size).plan)
        return gm.forward

    with torch.no_grad():
        torch.compile(model, backend=record)(*args, **(kwargs or {}))
    plan = merge(plans)
    if plan is None:
        raise DetectionError(
            "Dynamo made no graph with parameters of this call. Plan a model that is not "
            "compiled yet, and call it as you would in production."
        )
    check_requested(plan, asked.requested, allow_missing)
    return plan

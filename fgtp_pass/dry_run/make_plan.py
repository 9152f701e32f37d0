"""Plans without ranks: trace a model, on any device, and show what the backend would do."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from fgtp_pass.detect.match import Pattern
from fgtp_pass.dry_run.trace import trace
from fgtp_pass.patterns import with_own
from fgtp_pass.plan.plan import Plan, merge
from fgtp_pass.plan.planner import check_requested
from fgtp_pass.plan.sizes import parse_sizes


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
    asked = parse_sizes(finegrained_tp_config, with_own(patterns))
    sizes = asked.resolve(data_parallel_size, ranks_per_host or data_parallel_size)
    traced = trace(model, args, kwargs, sizes, data_parallel_size, patterns)
    plan = merge(planned.plan for _, planned in traced)
    assert plan is not None
    check_requested(plan, asked.requested, allow_missing)
    return plan

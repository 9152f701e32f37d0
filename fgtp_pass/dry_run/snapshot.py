"""Graphs before and after the pass, as text, without ranks."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from fgtp_pass.collectives.groups import ComponentGroup
from fgtp_pass.detect.match import Pattern
from fgtp_pass.dry_run.trace import trace
from fgtp_pass.graph.text import graph_text
from fgtp_pass.patterns import with_own
from fgtp_pass.plan.sizes import parse_sizes
from fgtp_pass.rewrite.rewrite import rewrite


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
    asked = parse_sizes(finegrained_tp_config, with_own(patterns))
    sizes = asked.resolve(data_parallel_size, data_parallel_size)
    snapshots = []
    for module, planned in trace(model, args, kwargs, sizes, data_parallel_size, patterns):
        groups = {k: _group_of(rank, k) for k in set(sizes.values())}
        taken = planned.at(planned.traced)
        rewritten = rewrite(module, taken, groups, {}, ragged=tokens == "ragged")
        snapshots.append(
            GraphSnapshot(
                graph_text(module.graph),
                graph_text(rewritten.module.graph),
                Counter(c.value for site in taken.sites for c in site.path.collectives),
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

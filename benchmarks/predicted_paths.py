"""What paths that are chosen by time, and by number of tokens, are predicted to change.

Of a whole model on eight devices of one node, all four components over eight data-parallel ranks.
"before": each site by itself, tokens move whatever their number; "after": sites that touch share
stretches, and each takes the path with the smallest predicted time. "fgtp plan" is what the planner
says, which prices components and not paths. Nothing is measured here: all figures are predictions
of the cost model (docs/cost-model.md), for devices that it has profiles of.
"""

from collections import Counter

import torch
from common import parser, report

from fgtp_pass.cost.estimate import Cluster
from fgtp_pass.cost.hardware import load
from fgtp_pass.cost.layout import Deployment, Layout, Load
from fgtp_pass.cost.path_seconds import Seconds, path_seconds
from fgtp_pass.dry_run.trace import trace
from fgtp_pass.models.config_json import read_config
from fgtp_pass.models.layer_stack import LayerStack, find_layers
from fgtp_pass.models.meta_model import build
from fgtp_pass.models.summarize import summarize
from fgtp_pass.models.trace_layers import decode_call
from fgtp_pass.options.path_prices import by_time
from fgtp_pass.plan.planner import PlannedGraph
from fgtp_pass.plan.prices import Prices

MODELS = ("deepseek-ai/DeepSeek-R1", "meta-llama/Llama-3.1-70B")
HARDWARE = ("h200", "ascend-910b-a2")
RANKS = 8
SIZES = dict.fromkeys(("embedding", "lmhead", "oproj", "mlp"), RANKS)
BATCH, PROMPT = 32, 8192  # sequences of a rank in decode, tokens of the prompt that it takes in
DTYPE = "bfloat16"


def planned_layers(name: str, prices: Prices, joins: bool) -> tuple[PlannedGraph, LayerStack]:
    """The plan of one layer of each kind, and which layers these stand for."""
    torch.compiler.reset()
    model = build(read_config(name))
    stack = find_layers(model)
    assert stack is not None
    with stack.only(stack.traced):
        ((_, planned),) = trace(model, (), decode_call(), SIZES, RANKS, (), joins, prices)
    return planned, stack


def rows_of(component: str, tokens: int) -> int:
    """Rows of a component in a decode step, or in a prefill: a head sees the last token only."""
    return tokens if tokens == BATCH or component != "lmhead" else 1


def collectives(planned: PlannedGraph, stack: LayerStack, seconds: Seconds, tokens: int) -> float:
    """Seconds of all collectives of the whole model."""
    names = {site.match.component for site in planned.sites}
    most = {name: rows_of(name, tokens) for name in names}
    stands_for, total = Counter(stack.stand_ins), 0.0
    for site in planned.at(planned.program(most)).sites if planned.ranges else planned.sites:
        number = stack.number(site.site.weights[0].fqn)
        layers = 1 if number is None else stands_for[stack.traced[number]]
        total += layers * seconds(site.path, most[site.match.component], RANKS, DTYPE)
    return total


def main() -> None:
    given = parser(__doc__).parse_args()
    rows, results = [], []
    for name in MODELS:
        before, stack = planned_layers(name, Prices(), joins=False)
        for hardware in map(load, HARDWARE):
            cluster = Cluster(hardware, RANKS, RANKS)
            seconds = path_seconds(cluster)
            after, _ = planned_layers(name, by_time(cluster, SIZES, BATCH), joins=True)
            deployment = Deployment(
                summarize(name), hardware, Load(RANKS * BATCH, PROMPT, 256), RANKS
            )
            experts = deployment.summary.experts is not None
            layouts = [
                Layout(data_parallel_size=RANKS, expert_parallel=experts, sizes=s)
                for s in ({}, SIZES)
            ]
            for what, tokens in (("TPOT", BATCH), ("prefill", PROMPT)):
                whole, planned = (
                    deployment.step_seconds(one, RANKS * BATCH)
                    if tokens == BATCH
                    else deployment.prefill_seconds(one)
                    for one in layouts
                )
                cut = whole + sum(
                    cluster.change_seconds(shape, RANKS, rows_of(name, tokens))
                    for name, shape in deployment.shapes.items()
                    if name in SIZES
                )
                moved = [collectives(one, stack, seconds, tokens) for one in (before, after)]
                figures = [whole, cut, cut - moved[0] + moved[1], planned, *moved]
                rows.append([name, hardware.title, what, *(1e3 * figure for figure in figures)])
                keys = (
                    *("unsharded", "before", "after", "by_component"),
                    *("collectives_before", "collectives_after"),
                )
                milliseconds = dict(zip(keys, (round(1e3 * f, 2) for f in figures), strict=True))
                results.append(
                    {"model": name, "hardware": hardware.name, "of": what} | milliseconds
                )
    columns = ["model", "hardware", "of", "unsharded", "before", "after", "`fgtp plan`"]
    columns += ["moving before", "after"]
    title = f"Predicted ms on {RANKS} devices, {BATCH} sequences per rank, prompts of {PROMPT}"
    report(title, columns, rows, {"benchmark": "predicted_paths", "rows": results}, given.output)


if __name__ == "__main__":
    main()

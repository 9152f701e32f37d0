"""A long prefill over a slow link: tokens to the weights, weights to the tokens, or what is chosen.

Two ranks, each in a network namespace of its own, joined by a pair of virtual interfaces whose rate
`tc` limits (a token bucket in both directions). Needs Linux, `ip`, `tc` and root; says so and ends
without them. One prefill without a cache, interleaved:

dp       unsharded, no message
tokens   every site moves its tokens, whatever their number
weights  every matmul's weights are gathered
bytes    as the pass chooses without constants: where the weights are fewer bytes than the tokens
time     as it chooses with constants, calibrated over this very link

`predicted` is what the calibration says of `time` against `dp`: its paths, and matmuls as they are.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import tomli_w
import torch
import torch.distributed as dist
from common import compared, integers, interleave, machine, parser, report
from decode_step import build, difference

import fgtp_pass
from fgtp_pass.algebra.path import Path as AlgebraPath
from fgtp_pass.backend import runtime
from fgtp_pass.calibration.measure import measure
from fgtp_pass.collectives.groups import data_parallel_group
from fgtp_pass.cost.estimate import Cluster
from fgtp_pass.cost.hardware import Hardware
from fgtp_pass.cost.path_seconds import path_seconds
from fgtp_pass.plan.planner import PlannedGraph, plan_graph
from fgtp_pass.plan.prices import Prices

SHAPE = {
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 2048,
}
SIZES = {"oproj_tensor_parallel_size": 2, "mlp_tensor_parallel_size": 2}
VARIANTS = ("dp", "tokens", "weights", "bytes", "time")
CHOSEN, FIXED = ("bytes", "time"), ("tokens", "weights")
PAIRS = (*((chosen, fixed) for chosen in CHOSEN for fixed in FIXED), ("time", "dp"))
RATES = ("1gbit", "200mbit")


def _gathering(path: AlgebraPath) -> tuple[float, ...]:
    """The price of a path that is to gather all it can."""
    return (-path.gathered, len(path.collectives), path.bytes_per_token)


# what a variant's paths are compared by; `time` is left to the pass
PRICES = {
    "tokens": Prices(),
    "weights": Prices(at=lambda tokens: lambda match: _gathering, by_range=True),
    "bytes": Prices(by_range=True),
}


@torch.no_grad()
def rank_main(counts: list[int], repetitions: int) -> list[dict[str, Any]]:
    """On every rank: by token count, times and errors of the variants, and the prediction."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    group = data_parallel_group(None, timedelta(seconds=600))
    hardware = measure(group, torch.device("cpu"), [torch.float32])
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as profile:
        profile.write(tomli_w.dumps(hardware.model_dump(exclude_none=True)))
        profile.flush()
        return [_at(count, repetitions, hardware, profile.name) for count in counts]


def _at(count: int, repetitions: int, hardware: Hardware, profile: str) -> dict[str, Any]:
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(100 + dist.get_rank())
    ids = torch.randint(0, SHAPE["vocab_size"], (1, count), generator=generator)
    steps: dict[str, Any] = {}
    logits: dict[str, torch.Tensor] = {}
    planned: list[PlannedGraph] = []

    def plan(*args: Any, prices: Prices, joins: bool) -> PlannedGraph:
        planned.append(plan_graph(*args, prices=PRICES.get(name, prices), joins=joins))
        return planned[-1]

    for i, name in enumerate(VARIANTS):
        model = build(SHAPE, torch.float32)
        # Dynamo would run one graph for all models with the same options
        options = {"finegrained_tp_config": SIZES, "timeout_seconds": 600 + i}
        if name == "time":
            options |= {"decode_batch": 1, "hardware": profile}
        given = {} if name == "dp" else {"backend": fgtp_pass.fgtp_backend, "options": options}
        fast = torch.compile(model, dynamic=False, **given)
        steps[name] = lambda fast=fast: fast(input_ids=ids, use_cache=False)
        with mock.patch.object(runtime, "plan_graph", plan):
            logits[name] = steps[name]().logits
    errors = {name: difference(logits[name], logits["dp"]) for name in VARIANTS[1:]}
    assert max(errors.values()) < 1e-4, errors
    compiles = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert compiles >= len(VARIANTS), "each has a graph of its own"
    times = interleave(steps, repetitions, 1, dist.barrier)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiles, "recompiled"
    seconds = path_seconds(Cluster(hardware, 2, 2))
    taken = planned[-1].at(planned[-1].traced).sites
    added = sum(seconds(site.path, count, 2, "float32") for site in taken)
    return {"tokens": count, "times": times, "errors": errors, "added": added}


@contextmanager
def link(rate: str) -> Iterator[Any]:
    """Two hosts whose link has this rate, as `tc` spells it.

    Without the rights `two_hosts` raises pytest.skip.Exception, as in a test.
    """
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from two_hosts import two_hosts

    with tempfile.TemporaryDirectory() as folder, two_hosts(Path(folder)) as hosts:
        for host in hosts.hosts:
            limit = f"qdisc add dev {host.interface} root tbf rate {rate} burst 256kb latency 100ms"
            command = ["ip", "netns", "exec", host.name, "tc", *limit.split()]
            if subprocess.run(command, capture_output=True).returncode:
                sys.exit("needs `tc` with its token bucket filter (iproute2, sch_tbf)")
        yield hosts


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--rates", nargs="*", default=RATES, help="of the link, as tc spells it")
    arguments.add_argument("--tokens", type=integers, default=[128, 512, 2048])
    arguments.add_argument("--repetitions", type=int, default=7)
    arguments.add_argument("--as-rank", action="store_true", help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.as_rank:
        dist.init_process_group("gloo", timeout=timedelta(seconds=600))
        print("RESULT" + json.dumps(rank_main(given.tokens, given.repetitions)))
        return
    table: list[list[Any]] = []
    results = {}
    for rate in given.rates:
        try:
            with link(rate) as hosts:
                counts = ",".join(map(str, given.tokens))
                job = ["--as-rank", f"--tokens={counts}", f"--repetitions={given.repetitions}"]
                printed = hosts.torchrun(Path(__file__).resolve(), *job, timeout=1800)
        except pytest.skip.Exception as why:
            sys.exit(str(why))
        per_rank = [json.loads(text.split("RESULT")[1].splitlines()[0]) for text in printed]
        columns, rows, results[rate] = compared(per_rank, VARIANTS, PAIRS)
        for row, result, one in zip(rows, results[rate], per_rank[0], strict=True):
            result["predicted_added_ms"] = round(1e3 * one["added"], 1)
            table.append([rate, *row, result["predicted_added_ms"]])
    whole = {"benchmark": "prefill_link", "machine": machine(), "model": SHAPE, "rates": results}
    title = "A prefill over a slow link, fp32, ms of the slower rank"
    report(title, ["link", *columns, "predicted time-dp"], table, whole, given.output)


if __name__ == "__main__":
    main()

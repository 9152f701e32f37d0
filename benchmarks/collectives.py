"""Latency of the collectives that the pass may use, over gloo on two ranks of one core each.

    all_gather     Own -> All
    all_to_all     Cut -> Own
    reduce_scatter Sum -> Own, gloo's own
    exchange_sum   Sum -> Own as the pass does it over gloo: an all_to_all and a local sum
    check          the all_gather of 512 bytes that compares token counts (check_tokens=True)

Shapes are a rank's own tokens. A matmul with a 16 MB weight runs before every call, so that caches
are as cold as in a decode step, then a barrier. The time is from the barrier to the end on the
rank that ends later. `queued` is the share of that time in which the threads of the rank were
runnable but had no core (the kernel's run-queue wait, summed over its threads, so it can pass 100%;
Linux only). Where it is large, other processes share the cores, and a second mode some
milliseconds away is theirs and not gloo's.
Not measured: a network, more than two ranks, collectives in flight together.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from common import (
    add_realtime,
    machine,
    parser,
    pin,
    realtime,
    report,
    run_ranks,
    shown,
    slower_rank,
    spread,
)

WORLD = 2
SHAPES = ((8, 2048), (32, 2048), (8, 16000))
PINNING = ("before", "after", "off")
_OPS = torch.ops._c10d_functional
# renamed in torch 2.13
_all_gather_flat = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def calls(group: str, tokens: int, width: int) -> dict[str, Callable[[], Any]]:
    """The collectives by name; inputs are made once."""
    own = torch.randn(tokens, width)
    every = torch.randn(WORLD * tokens, width)
    header = torch.zeros(64, dtype=torch.int64)
    headers = torch.zeros(WORLD * 64, dtype=torch.int64)
    splits = [tokens] * WORLD

    def wait(x: torch.Tensor) -> torch.Tensor:
        waited: torch.Tensor = _OPS.wait_tensor(x)
        return waited

    def all_to_all() -> torch.Tensor:
        return wait(_OPS.all_to_all_single(every, splits, splits, group))

    return {
        "all_gather": lambda: wait(_OPS.all_gather_into_tensor(own, WORLD, group)),
        "all_to_all": all_to_all,
        "reduce_scatter": lambda: wait(_OPS.reduce_scatter_tensor(every, "sum", WORLD, group)),
        "exchange_sum": lambda: all_to_all().view(WORLD, tokens, width).sum(0),
        "check": lambda: _all_gather_flat(headers, header),
    }


def queue_seconds() -> float:
    """Seconds that all threads of this process have waited for a core so far."""
    total = 0
    for task in Path("/proc/self/task").glob("*/schedstat"):
        try:
            total += int(task.read_text().split()[1])
        except (OSError, IndexError):  # a thread that ended
            continue
    return total / 1e9


def rank_main(repetitions: int, pinning: str, at_realtime: bool) -> list[dict[str, Any]]:
    """Times and run-queue waits by shape and collective."""
    if pinning == "after":
        pin(dist.get_rank())  # this thread only: those of gloo have started
    group = dist.group.WORLD.group_name
    weight = torch.randn(2048, 2048)
    x = torch.randn(8, 2048)
    results = []
    for tokens, width in SHAPES:
        by_name = calls(group, tokens, width)
        times: dict[str, list[float]] = {name: [] for name in by_name}
        queued: dict[str, list[float]] = {name: [] for name in by_name}
        for repetition in range(-5, repetitions):
            for name, call in by_name.items():
                F.linear(x, weight)
                with realtime(at_realtime):
                    dist.barrier()
                    waited, start = queue_seconds(), time.perf_counter()
                    call()
                    elapsed = time.perf_counter() - start
                    waited = queue_seconds() - waited
                if repetition >= 0:
                    times[name].append(elapsed)
                    queued[name].append(waited)
        results.append({"shape": [tokens, width], "times": times, "queued": queued})
    return results


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--repetitions", type=int, default=100)
    arguments.add_argument(
        "--pin",
        choices=PINNING,
        default="before",
        help="bind to a core before gloo starts its threads, after (the main thread only), or not",
    )
    add_realtime(arguments)
    given = arguments.parse_args()
    at = machine() | {"pinned": given.pin, "realtime": given.realtime}
    per_rank = run_ranks(
        WORLD,
        rank_main,
        given.repetitions,
        given.pin,
        given.realtime,
        pinned=given.pin == "before",
    )
    rows, results = [], []
    for together in zip(*per_rank, strict=True):
        times = slower_rank([one["times"] for one in together])
        for name, values in times.items():
            waits = [sum(one["queued"][name]) for one in together]
            share = max(waits) / sum(values)
            slow = sum(v > 2e-3 for v in values) / len(values)
            of = spread(values)
            rows.append([together[0]["shape"], name, shown(of, 2), f"{slow:.0%}", f"{share:.0%}"])
            results.append(
                {
                    "shape": together[0]["shape"],
                    "collective": name,
                    "milliseconds": of,
                    "share_above_2ms": round(slow, 3),
                    "share_queued": round(share, 3),
                }
            )
    report(
        "gloo over loopback, two ranks, fp32: ms of the slower rank, median [p10-p90]",
        ["own tokens", "collective", "ms", "> 2 ms", "queued"],
        rows,
        {"benchmark": "collectives", "machine": at, "results": results},
        given.output,
    )


if __name__ == "__main__":
    main()

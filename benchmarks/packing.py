"""One matmul x @ W.T with few and many rows: torch's, oneDNN's, and oneDNN's with packed weights.

Two processes of one thread each, pinned to a core each, run the same matmul at once, because the
ranks of a decode step share the memory's bandwidth too. Every call takes another weight, so that
none is in a cache. Per matmul:

    linear   torch.nn.functional.linear: what a plain weight gets
    onednn   oneDNN's linear on the plain weight
    packed   oneDNN's linear on the weight as the pass packs it

Not measured: packing itself, which happens once, while a weight is sharded.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from common import (
    Times,
    add_realtime,
    integers,
    interleave,
    machine,
    parser,
    ratio,
    report,
    run_ranks,
    slower_rank,
    spread,
)

from fgtp_pass.weights import packing

OUT, IN = 4096, 2048
BYTES = 300_000_000  # of weights, which is far more than a cache holds


def onednn(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return out


def packed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = torch.ops.fgtp_pass.linear(x, weight, None)
    return out


def over(
    function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    weights: list[torch.Tensor],
) -> None:
    for weight in weights:
        function(x, weight)


@torch.no_grad()
def rank_main(dtype: str, rows: list[int], repetitions: int, at_realtime: bool) -> list[Times]:
    kind = getattr(torch, dtype)
    count = BYTES // (OUT * IN * kind.itemsize)
    plain = [torch.randn(OUT, IN).to(kind) for _ in range(count)]
    as_packed = [weight.clone() for weight in plain]
    for weight in as_packed:
        packing.pack(weight)
    results = []
    for n in rows:
        x = torch.randn(n, IN).to(kind)
        calls = {
            "linear": partial(over, F.linear, x, plain),
            "onednn": partial(over, onednn, x, plain),
            "packed": partial(over, packed, x, as_packed),
        }
        times = interleave(calls, repetitions, 1, dist.barrier, at_realtime)
        results.append({k: [one / count for one in values] for k, values in times.items()})
    return results


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    arguments.add_argument("--rows", type=integers, default=[1, 2, 4, 8, 16, 32, 64, 512])
    arguments.add_argument("--repetitions", type=int, default=7)
    add_realtime(arguments)
    given = arguments.parse_args()
    if not packing.supports(torch.empty(OUT, IN, dtype=getattr(torch, given.dtype))):
        print(f"skipped: the pass packs no {given.dtype} weights on this machine")
        return
    at = machine()
    per_rank = run_ranks(2, rank_main, given.dtype, given.rows, given.repetitions, given.realtime)
    rows, results = [], []
    for n, *together in zip(given.rows, *per_rank, strict=True):
        times = slower_rank(together)
        spreads = {name: spread(values) for name, values in times.items()}
        ratios = {f"{name}/packed": ratio(times[name], times["packed"]) for name in times}
        del ratios["packed/packed"]
        rows.append([n, *(one["median"] for one in spreads.values()), *ratios.values()])
        results.append({"rows": n, "milliseconds": spreads, "ratios": ratios})
    report(
        f"x @ W.T, W [{OUT}, {IN}], {given.dtype}: ms of the slower of two processes, median",
        ["rows", *spreads, *ratios],
        rows,
        {
            "benchmark": "packing",
            "machine": at | {"realtime": given.realtime},
            "weight": [OUT, IN],
            "dtype": given.dtype,
            "results": results,
        },
        given.output,
    )


if __name__ == "__main__":
    main()

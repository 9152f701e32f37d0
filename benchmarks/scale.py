"""What grows with the number of data-parallel ranks, which stand in groups of 8.

A toy model on 8 to 64 ranks of one machine. `first call` is from the first call to its end on the
slowest rank: compiling, one meeting of all ranks for each thing to agree on, checksums, cutting.
`meeting` is one exchange of all ranks by way of the store, alone. `step` is a call of the compiled
model in which all groups run at once. `connections` and `memory` are those of one rank; memory is
what the process has beyond what it had before the first call.
All ranks share the cores, so times of more ranks than cores contain the waiting for a core. Not
measured: a network, and a store on another host.
"""

import time
from datetime import timedelta
from typing import Any

import psutil
import torch
from common import integers, machine, parser, report, run_ranks, shown, spread
from torch import nn

import fgtp_pass
from fgtp_pass import fgtp_backend
from fgtp_pass.agreement.control_group import all_ranks
from fgtp_pass.agreement.message import Intent
from fgtp_pass.collectives.groups import data_parallel_group

GROUP = 8
ROUNDS = 20


class Toy(nn.Module):
    """An FFN between an embedding and an lm_head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(64, 32)
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 32)
        self.head = nn.Linear(32, 64)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x: torch.Tensor = self.table(ids)
        logits: torch.Tensor = self.head(x + self.down(torch.relu(self.up(x))))
        return logits


@torch.no_grad()
def measure(rounds: int) -> dict[str, Any]:
    """In a rank: seconds of the first call, of meetings and of steps; connections and bytes."""
    process = psutil.Process()
    model, ids = Toy(), torch.zeros(1, 2, dtype=torch.long)
    options = {
        "finegrained_tp_config": {
            "embedding_tensor_parallel_size": GROUP,
            "mlp_tensor_parallel_size": GROUP,
        },
        "inner_backend": "eager",
        "timeout_seconds": 300,
    }
    fast = torch.compile(model, backend=fgtp_backend, options=options)
    before, start = process.memory_info().rss, time.perf_counter()
    fast(ids)
    first = time.perf_counter() - start
    meeting = all_ranks(data_parallel_group(None, timedelta(seconds=300)))
    meetings, steps = [], []
    for _ in range(rounds):
        start = time.perf_counter()
        meeting.exchange(Intent.SHARD)
        meetings.append(time.perf_counter() - start)
    for _ in range(rounds):
        start = time.perf_counter()
        fast(ids)
        steps.append(time.perf_counter() - start)
    found = [c for c in process.net_connections("tcp") if c.status == psutil.CONN_ESTABLISHED]
    plan = fgtp_pass.applied_plan(fast)
    assert plan is not None
    assert len(plan.sites) == 2
    return {
        "first": first,
        "meetings": meetings,
        "steps": steps,
        "connections": len(found),
        "bytes": process.memory_info().rss - before,
    }


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--ranks", type=integers, default=[8, 16, 32, 64])
    arguments.add_argument("--rounds", type=int, default=ROUNDS)
    given = arguments.parse_args()
    rows, results = [], {}
    for world in given.ranks:
        ranks = run_ranks(world, measure, given.rounds, pinned=False)
        meeting = spread([max(at) for at in zip(*(r["meetings"] for r in ranks), strict=True)])
        step = spread([max(at) for at in zip(*(r["steps"] for r in ranks), strict=True)])
        first = max(r["first"] for r in ranks)
        connections = max(r["connections"] for r in ranks[1:])
        memory = sorted(r["bytes"] for r in ranks)[world // 2] / 2**20
        of_first = ranks[0]["connections"]
        rows.append((world, first, shown(meeting), shown(step), connections, of_first, memory))
        results[str(world)] = {
            "first_call_s": first,
            "meeting_ms": meeting,
            "step_ms": step,
            "connections": connections,
            "connections_of_rank_0": of_first,
            "memory_mib": memory,
        }
    columns = (
        "ranks", "first call, s", "meeting, ms", "step, ms", "connections", "of rank 0",
        "memory, MiB",
    )  # fmt: skip
    report(
        f"A toy model in groups of {GROUP}",
        columns,
        rows,
        {"benchmark": "scale", "machine": machine(), "results": results},
        given.output,
    )


if __name__ == "__main__":
    main()

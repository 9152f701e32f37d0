"""Memory of a rank before and after sharding, and its peak while the weights are cut.

A Llama-like fp32 model of some 0.2 billion random parameters on 2 and 4 gloo ranks. Each rank
first shards a toy model, so that what a process loads once (Dynamo, the pass) is resident before;
then it runs one step of the real one unsharded in eager mode, compiles it with the pass (eager
inner backend: no inner compiler's memory is counted) and runs one step more.

    weights   bytes of the parameters that the rank really holds (shards and whole ones)
    resident  resident set of the process
    returned  resident set given back, and over what the plan says; 95% is the target. The
              graph itself, which stays, counts against it
    peak      largest resident set while tracing and sharding above the one before; at most the
              largest weight is right

Not measured: accelerator memory, memory-mapped checkpoints.
"""

import gc
import math
import os
import threading
import time
import warnings
from typing import Any

import psutil
import torch
from common import integers, machine, parser, report, run_ranks
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import fgtp_pass

SHAPE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 10,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
}
TOY = SHAPE | {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 512}
MIB = 2**20


class PeakWatch:
    """The largest resident set of this process while the block runs, polled in a thread."""

    def __init__(self, every_seconds: float = 0.002):
        self._process = psutil.Process()
        self._every = every_seconds
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)
        self.peak = 0

    def _poll(self) -> None:
        while not self._done.is_set():
            self.peak = max(self.peak, self._process.memory_info().rss)
            time.sleep(self._every)

    def __enter__(self) -> "PeakWatch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.peak = max(self.peak, self._process.memory_info().rss)


def resident() -> int:
    gc.collect()
    return int(psutil.Process(os.getpid()).memory_info().rss)


def held_bytes(model: nn.Module) -> int:
    """Bytes of the storages behind this rank's parameters, each once."""
    tensors = fgtp_pass.shard_state_dict(model).values()
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def compiled(model: nn.Module, world: int) -> Any:
    sizes = {f"{c}_tensor_parallel_size": world for c in ("embedding", "lmhead", "oproj", "mlp")}
    return torch.compile(
        model,
        backend=fgtp_pass.fgtp_backend,
        options={"finegrained_tp_config": sizes, "inner_backend": "eager"},
        dynamic=False,
    )


@torch.no_grad()
def rank_main(world: int, shape: dict[str, int]) -> dict[str, Any]:
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    ids = torch.randint(0, TOY["vocab_size"], (4, 1))
    toy = LlamaForCausalLM(LlamaConfig(**TOY)).eval().requires_grad_(False)
    compiled(toy, world)(input_ids=ids, use_cache=False)
    model = LlamaForCausalLM(LlamaConfig(**shape, dtype=torch.float32)).eval()
    model.requires_grad_(False)
    want = model(input_ids=ids, use_cache=False).logits
    fast = compiled(model, world)
    before, held_before = resident(), held_bytes(model)
    with PeakWatch() as watch:
        got = fast(input_ids=ids, use_cache=False).logits
    after, held_after = resident(), held_bytes(model)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    plan = fgtp_pass.applied_plan(fast)
    assert plan is not None
    return {
        "weights_before": held_before,
        "weights_after": held_after,
        "resident_before": before,
        "resident_after": after,
        "peak": watch.peak,
        "planned": plan.bytes_saved_per_rank,
        "largest_weight": max(math.prod(p.shape) * p.dtype.itemsize for p in model.parameters()),
    }


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--worlds", type=integers, default=[2, 4], help="numbers of ranks")
    given = arguments.parse_args()
    at = machine()
    rows, results = [], []
    for world in given.worlds:
        for rank, of in enumerate(run_ranks(world, rank_main, world, SHAPE, pinned=False)):
            freed = of["resident_before"] - of["resident_after"]
            above = of["peak"] - of["resident_before"]
            rows.append(
                [
                    f"{rank} of {world}",
                    *(f"{of[k] / MIB:.0f}" for k in (
                        "weights_before", "weights_after", "resident_before", "resident_after",
                        "planned")),
                    f"{freed / MIB:.0f}",
                    f"{freed / of['planned']:.1%}",
                    f"{above / MIB:+.0f}",
                    f"{of['largest_weight'] / MIB:.0f}",
                ]
            )  # fmt: skip
            results.append(
                {
                    "world": world,
                    "rank": rank,
                    "bytes": of,
                    "weights_match_plan": of["weights_before"] - of["weights_after"]
                    == of["planned"],
                    "returned_over_planned": round(freed / of["planned"], 4),
                    "peak_above_before": above,
                }
            )
    report(
        "Memory per rank in MiB",
        ["rank", "weights", "-> sharded", "resident", "-> sharded", "planned", "returned",
         "of plan", "peak above", "largest weight"],
        rows,
        {"benchmark": "memory", "machine": at, "model": SHAPE, "results": results},
        given.output,
    )  # fmt: skip


if __name__ == "__main__":
    main()

"""Collectives and bytes of a step, counted while it runs, against those of the plan.

A dispatch mode sees every collective op of the compiled step on each rank. Each model is run as
planned, and with each of its sites by itself. What is counted is what a rank hands to its
collectives, as the algebra counts it (`fgtp_pass.algebra.path.sent_bytes`): over gloo a
reduce_scatter runs as an all_to_all, and an all_reduce between two ranks as an all_gather, which
send as many bytes. Not counted: the token check, and what the transport adds. Exits with status 1
if a row is not as planned.
"""

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from common import integers, parser, report, run_ranks
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

import fgtp_pass

MODELS = {
    "llama": {"num_key_value_heads": 4},
    "phi": {"num_key_value_heads": 4},
    "gemma2": {"num_key_value_heads": 4, "head_dim": 32},
    "gpt2": {},
}
SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "vocab_size": 1000,
    "pad_token_id": None,
}
GPT2 = {"n_embd": 256, "n_inner": 512, "n_layer": 4, "n_head": 8, "vocab_size": 1000}
COMPONENTS = ("embedding", "lmhead", "oproj", "mlp")
_OPS = torch.ops._c10d_functional


class Counting(TorchDispatchMode):
    """Counts collectives, and the bytes that this rank sends with them to a group of `size`."""

    def __init__(self, size: int):
        super().__init__()
        self.size, self.messages, self.sent = size, Counter[str](), 0.0

    def backend(self, graph: Any, inputs: Any) -> Any:
        """An inner backend that runs a graph as it is, counted: Dynamo does not run in a mode."""

        def run(*args: Any) -> Any:
            with self:
                return graph.forward(*args)

        return run

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        share = {
            _OPS.all_gather_into_tensor.default: self.size - 1,
            _OPS.all_to_all_single.default: (self.size - 1) / self.size,
            _OPS.reduce_scatter_tensor.default: (self.size - 1) / self.size,
            _OPS.all_reduce.default: 2 * (self.size - 1) / self.size,
        }.get(func)
        if share is not None:
            self.messages[func.name()] += 1
            self.sent += share * args[0].nbytes
        return func(*args, **(kwargs or {}))


def build(name: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    shape = GPT2 if name == "gpt2" else SHAPE | MODELS[name]
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **shape)).to(dtype).eval()


@torch.no_grad()
def rank_main(models: list[str], dtype: str, counts: list[int]) -> list[list[Any]]:
    """On every rank: model, components, tokens, messages and bytes as planned and as counted."""
    rows = []
    world = dist.get_world_size()
    for name in models:
        for chosen in (COMPONENTS, COMPONENTS[:2], COMPONENTS[2:3], COMPONENTS[3:]):
            torch._dynamo.reset()
            model = build(name, getattr(torch, dtype))
            sizes = {f"{component}_tensor_parallel_size": world for component in chosen}
            counted = Counting(world)
            options = {"finegrained_tp_config": sizes, "inner_backend": counted.backend}
            fast = torch.compile(model, backend=fgtp_pass.fgtp_backend, options=options)
            for tokens in counts:
                ids = torch.randint(0, 1000, (tokens, 1))
                fast(input_ids=ids, use_cache=False)  # compiles
                counted.messages.clear()
                counted.sent = 0.0
                fast(input_ids=ids, use_cache=False)
                plan = fgtp_pass.applied_plan(fast)
                assert plan is not None
                planned = sum(site.bytes_per_token for site in plan.sites) * tokens
                what = ", ".join(chosen)
                messages = counted.messages.total()
                rows.append(
                    [name, what, tokens, plan.collectives_per_step, messages, planned, counted.sent]
                )
    return rows


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    arguments.add_argument("--world", type=int, default=2)
    arguments.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    arguments.add_argument("--tokens", type=integers, default=[1, 8])
    given = arguments.parse_args()
    asked = (given.models, given.dtype, given.tokens)
    rows, *others = run_ranks(given.world, rank_main, *asked, pinned=False)
    assert all(rows == other for other in others), "ranks differ"
    # features that the ranks do not divide are padded
    wrong = [row for row in rows if row[3] != row[4] or not row[5] <= row[6] <= 1.01 * row[5]]
    columns = ["model", "sharded", "tokens/rank", "messages", "counted", "bytes sent", "counted"]
    report(
        f"Messages and bytes of a step and a rank, {given.world} ranks, {given.dtype}",
        columns,
        rows,
        {"benchmark": "messages", "world": given.world, "dtype": given.dtype, "rows": rows},
        given.output,
    )
    if wrong:
        raise SystemExit(f"{len(wrong)} rows are not as planned: {wrong}")


if __name__ == "__main__":
    main()

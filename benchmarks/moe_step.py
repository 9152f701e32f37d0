"""One decode step of a small mixture of experts on two ranks: whole, four components, six.

A Qwen2-MoE with random weights, a shared expert in every layer and multi-head attention, so that q,
k and v are a quarter of its dense weights. Every rank is a process with one thread, pinned to one
core, over gloo on 127.0.0.1, and decodes one token for each of its own sequences over a static
cache.
Variants, interleaved in one run:

    whole       plain data parallelism, compiled with Inductor
    packed      the same with every linear outside the experts packed as the pass packs its shards
    four        embedding, lm_head and o_proj over both ranks (it has no dense FFN)
    with-shared the shared experts too
    six         q, k and v too

A step is timed from a barrier to its end, on the rank that ends later. The logits of all variants
are compared before anything is timed (the median over tokens). Not measured: prefill, experts over
ranks, a network.
"""

import statistics
import warnings
from typing import Any

import torch
import torch.distributed as dist
from common import (
    add_realtime,
    compared,
    integers,
    interleave,
    machine,
    parser,
    report,
    run_ranks,
)
from decode_step import POSITIONS, TOLERANCE, WORLD, decoder, difference, pack_linears
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

import fgtp_pass

SHAPE = {
    "hidden_size": 1024,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 4096,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 32000,
}
TINY = SHAPE | {
    "hidden_size": 128,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 256,
    "vocab_size": 512,
}
_FOUR = ("embedding", "lmhead", "oproj")
VARIANTS: dict[str, tuple[str, ...]] = {
    "whole": (),
    "packed": (),
    "four": _FOUR,
    "with-shared": (*_FOUR, "sharedexpert"),
    "six": (*_FOUR, "sharedexpert", "qkv"),
}


def build(shape: dict[str, int], dtype: torch.dtype) -> Qwen2MoeForCausalLM:
    """The same random model on every rank and in every variant."""
    torch.manual_seed(0)
    config = Qwen2MoeConfig(**shape, dtype=dtype, max_position_embeddings=POSITIONS)
    # the loop over experts breaks graphs, and each part would be planned by itself
    config._experts_implementation = "batched_mm"
    config.head_dim = config.hidden_size // config.num_attention_heads
    return Qwen2MoeForCausalLM(config).to(dtype).eval().requires_grad_(False)


@torch.no_grad()
def rank_main(
    shape: dict[str, int], dtype: str, counts: list[int], repetitions: int, at_realtime: bool
) -> dict[str, Any]:
    """On every rank: what each variant holds, and per token count its times and errors."""
    torch._inductor.config.compile_threads = 1
    warnings.filterwarnings("ignore")
    models = {name: build(shape, getattr(torch, dtype)) for name in VARIANTS}
    pack_linears(models["packed"])
    results, saved = [], dict[str, int]()
    for count in counts:
        torch._dynamo.reset()
        generator = torch.Generator().manual_seed(100 + dist.get_rank())
        ids = torch.randint(0, shape["vocab_size"], (count, 1), generator=generator)
        steps = {}
        for name, components in VARIANTS.items():
            compiled: Any = torch.compile(models[name], dynamic=False)
            if components:
                sizes = {f"{c}_tensor_parallel_size": WORLD for c in components}
                options = {"finegrained_tp_config": sizes}
                backend = fgtp_pass.fgtp_backend
                compiled = torch.compile(
                    models[name], backend=backend, options=options, dynamic=False
                )
            steps[name] = decoder(compiled, models[name].config, ids)
        logits = {name: step().float() for name, step in steps.items()}  # compiles
        # in half precision near ties give one token in some fifty another expert, whole or not
        errors = {
            name: statistics.median(
                difference(one, of_whole)
                for one, of_whole in zip(value, logits["whole"], strict=True)
            )
            for name, value in logits.items()
        }
        bad = {n: e for n, e in errors.items() if not e < TOLERANCE[dtype]}
        assert not bad, f"the logits differ from the whole model's: {bad}"
        for name, model in models.items():
            plan = fgtp_pass.applied_plan(model)
            saved[name] = plan.bytes_saved_per_rank if plan else 0
        times = interleave(steps, repetitions, 3, dist.barrier, at_realtime)
        results.append({"tokens": count, "times": times, "errors": errors})
    return {"saved": saved, "results": results}


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--dtype", choices=sorted(TOLERANCE), default="float32")
    arguments.add_argument("--tokens", type=integers, default=[1, 4, 8, 16])
    arguments.add_argument("--repetitions", type=int, default=24)
    add_realtime(arguments)
    arguments.add_argument("--tiny", action="store_true", help="a toy model, to try the benchmark")
    given = arguments.parse_args()
    shape = TINY if given.tiny else SHAPE
    at = machine()
    call = (shape, given.dtype, given.tokens, given.repetitions, given.realtime)
    per_rank = run_ranks(WORLD, rank_main, *call)
    pairs = [("whole", "six"), *(("packed", name) for name in ("four", "with-shared", "six"))]
    by_count = [one["results"] for one in per_rank]
    columns, rows, results = compared(by_count, list(VARIANTS), pairs)
    saved = {name: round(count / 2**20, 1) for name, count in per_rank[0]["saved"].items()}
    report(
        f"One decode step of a MoE, {WORLD} ranks, {given.dtype}: ms of the slower rank, "
        f"median [p10-p90]; MiB freed per rank: {saved}",
        columns,
        rows,
        {
            "benchmark": "moe_step",
            "machine": at | {"realtime": given.realtime},
            "model": shape | {"dtype": given.dtype},
            "mib_freed_per_rank": saved,
            "results": results,
        },
        given.output,
    )


if __name__ == "__main__":
    main()

"""Prefill and decode mixed, in real vLLM on two data-parallel ranks: unsharded against all four.

The engines are those of `vllm_ranks`, with chunked prefill. Each rank decodes `--steady` requests;
meanwhile long prompts come one after the other: each when the one before has its first token and
the steady requests have made `GAP` tokens more, on the second rank half a gap later. So both
variants do the same work, whatever time they take. In a step the ranks of a component group run
at the token count of the rank that has most.

TTFT: from handing a long prompt to the engine until its first token, the median of a rank's
prompts. TPOT: of the steady requests, prefills included. Both on the rank where they are longer.
Engines take turns. `none` pairs unsharded with unsharded: the benchmark's own bias.
"""

import functools
import statistics
import time
from typing import Any

from common import integers, machine, parser, ratio, report, shown, spread
from vllm_ranks import COMPONENTS, WORLD, Engines, model_folder, pairs, take_turns

VARIANTS: dict[str, tuple[str, ...]] = {"none": (), "all four": COMPONENTS}
GAP = 8  # tokens of a steady request between two long prompts
FIRST = 4  # tokens of a steady request before the first long prompt
CHUNK = 64  # tokens of a step
OPTIONS = {"max_model_len": 512, "max_num_seqs": 16}
OPTIONS |= {"enable_chunked_prefill": True, "max_num_batched_tokens": CHUNK}
LIMIT = 600
FIGURES = ("TTFT", "TPOT")


def mixed(engine: Any, rank: int, steady: int, prompts: int, length: int) -> tuple[float, float]:
    """On a rank: the median TTFT of the long prompts, and the TPOT of the steady requests."""
    from vllm import SamplingParams

    llm = engine.llm_engine

    def add(name: str, ids: list[int], tokens: int) -> None:
        sampling = SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False
        )
        llm.add_request(name, {"prompt_token_ids": ids}, sampling)

    total = FIRST + GAP * (prompts + 2)
    for i in range(steady):
        add(f"steady {i}", [7 + i] * 8, total)
    due = FIRST + rank * GAP // WORLD
    asked: dict[str, float] = {}
    first: dict[str, float] = {}
    began: dict[str, tuple[float, int]] = {}
    per_token = []
    while llm.has_unfinished_requests():
        outputs = llm.step()
        now = time.perf_counter()
        for out in outputs:
            made = len(out.outputs[0].token_ids)
            if out.request_id in asked:
                first.setdefault(out.request_id, now)
            elif out.request_id not in began:
                began[out.request_id] = now, made
            elif out.finished:
                then, had = began[out.request_id]
                per_token.append((now - then) / (made - had))
            idle = len(first) == len(asked) < prompts
            if out.request_id == "steady 0" and made >= due and idle:
                name = f"long {len(asked)}"
                add(name, [11 + len(asked)] * length, 1)
                asked[name] = time.perf_counter()
                due = made + GAP
    if len(first) < prompts:
        raise SystemExit(f"{len(first)} of {prompts} long prompts came within {total} tokens")
    waits = [first[name] - when for name, when in asked.items()]
    return statistics.median(waits), statistics.median(per_token)


def on_the_slower(steady: int, prompts: int, length: int, ranks: Engines) -> tuple[float, float]:
    """TTFT and TPOT in seconds, each on the rank where it is longer."""
    arguments = [(rank, steady, prompts, length) for rank in range(WORLD)]
    answers = ranks.run(mixed, arguments, LIMIT)
    ttft, tpot = zip(*answers, strict=True)
    return max(ttft), max(tpot)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--steady", type=integers, default=[4], help="requests per rank")
    arguments.add_argument("--prompts", type=int, default=5, help="long ones per rank and turn")
    arguments.add_argument("--length", type=int, default=256, help="tokens of a long prompt")
    arguments.add_argument("--repetitions", type=int, default=7)
    arguments.add_argument("--tiny", action="store_true", help="a toy model, to try the benchmark")
    given = arguments.parse_args()
    records = []
    with model_folder(given.tiny) as (folder, shape):
        for name, *both in pairs(folder, VARIANTS, OPTIONS):
            for steady in given.steady:
                measure = functools.partial(on_the_slower, steady, given.prompts, given.length)
                taken = take_turns(measure, both, given.repetitions)
                for at, figure in enumerate(FIGURES):
                    unsharded, this = ([turn[at] for turn in of_one] for of_one in taken)
                    records.append(record(name, steady, figure, unsharded, this))
    report(
        f"vLLM, {WORLD} data-parallel ranks, fp32, prompts of {given.length} in chunks of {CHUNK}: "
        "the slower rank, median [p10-p90]",
        ["steady/rank", "sharded", "of", "unsharded ms", "this ms", "unsharded/this"],
        [row(one) for one in records],
        {"benchmark": "vllm_mixed", "machine": machine(), "model": shape, "results": records},
        given.output,
    )


def record(
    name: str, steady: int, figure: str, unsharded: list[float], this: list[float]
) -> dict[str, Any]:
    return {
        "steady_per_rank": steady,
        "variant": name,
        "figure": figure,
        "unsharded_milliseconds": spread(unsharded),
        "milliseconds": spread(this),
        "unsharded_over_this": ratio(unsharded, this),
    }


def row(one: dict[str, Any]) -> list[Any]:
    return [
        one["steady_per_rank"],
        one["variant"],
        one["figure"],
        shown(one["unsharded_milliseconds"]),
        shown(one["milliseconds"]),
        f"{one['unsharded_over_this']:.2f}",
    ]


if __name__ == "__main__":
    main()

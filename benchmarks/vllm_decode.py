"""Steady decode in real vLLM, two data-parallel ranks: unsharded against each component and all.

The engines are those of `vllm_ranks`. A rank decodes `--requests` requests at a time; the time per
output token (TPOT) is the difference of a long and a short `generate`, by the difference of their
tokens, which leaves prefill, start and end out, on the rank where it is longer.

The unsharded engines stay; those of a variant are started beside them, and the two take turns.
Changes and ratios are those of such a pair. `none` pairs unsharded with unsharded. Weight bytes
freed per rank are those of the plan in force; resident memory is that of the worker process.
"""

import functools
import time
from typing import Any

from common import integers, machine, parser, ratio, report, shown, spread
from vllm_ranks import COMPONENTS, WORLD, Engines, model_folder, pairs, take_turns

# "none" is the control: a second unsharded engine, so that it shows the benchmark's own bias
VARIANTS = {"none": (), **{name: (name,) for name in COMPONENTS}, "all four": COMPONENTS}
SHORT, LONG = 4, 36  # tokens of a request
ANSWER_SECONDS = 120
OPTIONS = {"max_model_len": 128, "max_num_seqs": 32}
REST = 1.5  # seconds; a worker without work spins for one before it sleeps


def decode(engine: Any, count: int, tokens: int) -> float:
    """On a rank: the seconds that `count` requests of so many tokens take."""
    from vllm import SamplingParams

    prompts: Any = [{"prompt_token_ids": [7 + i] * 8} for i in range(count)]
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    start = time.perf_counter()
    engine.generate(prompts, sampling, use_tqdm=False)
    return time.perf_counter() - start


def seconds_per_token(count: int, ranks: Engines) -> float:
    """The TPOT of `count` requests per rank, on the slower rank."""
    short, long = (
        ranks.run(decode, [(count, tokens)] * WORLD, ANSWER_SECONDS) for tokens in (SHORT, LONG)
    )
    time.sleep(REST)
    return max(b - a for a, b in zip(short, long, strict=True)) / (LONG - SHORT)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--requests", type=integers, default=[4, 8], help="at a time, per rank")
    arguments.add_argument("--repetitions", type=int, default=7)
    arguments.add_argument(
        "--mode", choices=("compiled", "none"), default="compiled", help="none: without a graph"
    )
    arguments.add_argument(
        "--sharded", action="append", choices=list(VARIANTS), help="all, if none is given"
    )
    arguments.add_argument("--tiny", action="store_true", help="a toy model, to try the benchmark")
    given = arguments.parse_args()
    options = OPTIONS | {"enforce_eager": given.mode == "none"}
    variants = {name: VARIANTS[name] for name in given.sharded or VARIANTS}
    rows, records = [], []
    with model_folder(given.tiny) as (folder, shape):
        for name, *both in pairs(folder, variants, options):
            for count in given.requests:
                measure = functools.partial(seconds_per_token, count)
                unsharded, this = take_turns(measure, both, given.repetitions)
                records.append(record(name, count, unsharded, this, both[1]))
                rows.append(row(records[-1]))
    report(
        f"vLLM, {WORLD} data-parallel ranks, fp32, mode {given.mode}: TPOT of the slower rank, "
        "median [p10-p90]",
        ["requests/rank", "sharded", "unsharded ms", "this ms", "change ms", "unsharded/this",
         "tokens/s/rank", "MiB freed", "MiB resident"],
        sorted(rows, key=lambda row: row[0]),
        {
            "benchmark": "vllm_decode",
            "machine": machine(),
            "model": shape,
            "mode": given.mode,
            "results": records,
        },
        given.output,
    )  # fmt: skip


def record(
    name: str, count: int, unsharded: list[float], this: list[float], variant: Engines
) -> dict[str, Any]:
    changes = [b - a for a, b in zip(unsharded, this, strict=True)]
    return {
        "requests_per_rank": count,
        "variant": name,
        "unsharded_milliseconds": spread(unsharded),
        "tpot_milliseconds": spread(this),
        "tpot_change_milliseconds": spread(changes),
        "unsharded_over_this": ratio(unsharded, this),
        "tokens_per_second_per_rank": count / spread(this, 1.0)["median"],
        "weight_bytes_freed_per_rank": variant.freed,
        "resident_bytes": variant.resident,
    }


def row(one: dict[str, Any]) -> list[Any]:
    return [
        one["requests_per_rank"],
        one["variant"],
        shown(one["unsharded_milliseconds"]),
        shown(one["tpot_milliseconds"]),
        "{median:+.1f} [{p10:+.1f} {p90:+.1f}]".format(**one["tpot_change_milliseconds"]),
        f"{one['unsharded_over_this']:.2f}",
        f"{one['tokens_per_second_per_rank']:.1f}",
        f"{one['weight_bytes_freed_per_rank'] / 2**20:.0f}",
        f"{one['resident_bytes'] / 2**20:.0f}",
    ]


if __name__ == "__main__":
    main()

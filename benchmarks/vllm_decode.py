"""Steady decode in real vLLM, two data-parallel ranks: unsharded against each component and all.

Every rank is a process with an engine of its own (the SPMD way), on one core, on a Llama-like
model with random weights (`load_format="dummy"`), fp32, compiled with Inductor. A rank decodes
`--requests` requests at a time; the time per output token (TPOT) is the difference of a long and a
short `generate`, by the difference of their tokens, which leaves prefill, start and end out.

Variants need an engine each, so they run one after the other, not interleaved; unsharded runs
first and last, and both are shown, as a measure of how far the machine drifted. Weight bytes freed
per rank are those of the plan in force; resident memory is that of the worker process.
"""

import json
import multiprocessing
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from common import free_port, integers, machine, parser, pin, ratio, report, shown, spread

WORLD = 2
COMPONENTS = ("embedding", "lmhead", "oproj", "mlp")
SHORT, LONG = 4, 36  # tokens of a request
START_SECONDS = 600
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 32000,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "torch_dtype": "float32",
}
TINY = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "vocab_size": 512}
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # to ask the worker what it holds
}


def held(worker: Any) -> tuple[int, int]:
    """Bytes that the plan in force has freed on this rank, and resident bytes of its process."""
    import psutil

    plan = getattr(worker.model_runner.model, "fgtp_plan", None)
    freed = plan.bytes_saved_per_rank if plan is not None else 0
    return freed, psutil.Process().memory_info().rss


def rank_main(
    rank: int,
    port: int,
    model: str,
    components: list[str],
    counts: list[int],
    times: int,
    pipe: Any,
) -> None:
    """One rank of one variant: sends TPOTs in seconds by request count, and what it holds."""
    pin(rank)
    os.environ.update(ENVIRONMENT)
    os.environ |= {"VLLM_DP_RANK": str(rank), "VLLM_DP_RANK_LOCAL": str(rank)}
    os.environ |= {"VLLM_DP_SIZE": str(WORLD), "VLLM_DP_MASTER_IP": "127.0.0.1"}
    os.environ["VLLM_DP_MASTER_PORT"] = str(port)
    if not components:  # stock vLLM runs the ranks of a dense model as engines of their own
        os.environ["VLLM_DP_SIZE"] = "1"
        os.environ["VLLM_DP_RANK"] = os.environ["VLLM_DP_RANK_LOCAL"] = "0"
    from vllm import LLM, SamplingParams

    sizes = {f"{component}_tensor_parallel_size": WORLD for component in components}
    options: dict[str, Any] = {}
    if components:
        options["compilation_config"] = {"passes": ["fgtp"]}
        options["additional_config"] = {"finegrained_tp_config": sizes}
    engine = LLM(
        model,
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=128,
        max_num_seqs=max(counts),
        enable_prefix_caching=False,
        **options,
    )

    def seconds(count: int, tokens: int) -> float:
        prompts: Any = [{"prompt_token_ids": [7 + i] * 8} for i in range(count)]
        sampling = SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False
        )
        start = time.perf_counter()
        engine.generate(prompts, sampling, use_tqdm=False)
        return time.perf_counter() - start

    tpot: dict[int, list[float]] = {}
    for count in counts:
        seconds(count, SHORT)
        tpot[count] = [
            (seconds(count, LONG) - seconds(count, SHORT)) / (LONG - SHORT) for _ in range(times)
        ]
    pipe.send((tpot, engine.collective_rpc(held)[0]))


def run_variant(model: str, components: list[str], counts: list[int], times: int) -> Any:
    """TPOTs of the slower rank by request count, and what the first rank holds."""
    context = multiprocessing.get_context("spawn")
    port, ranks, pipes = free_port(), [], []
    for rank in range(WORLD):
        ours, theirs = context.Pipe(duplex=False)
        arguments = (rank, port, model, components, counts, times, theirs)
        ranks.append(context.Process(target=rank_main, args=arguments))
        ranks[-1].start()
        pipes.append(ours)
    try:
        answers = []
        for rank, pipe in enumerate(pipes):
            if not pipe.poll(START_SECONDS):
                raise SystemExit(f"rank {rank} of {components or 'unsharded'} did not answer")
            answers.append(pipe.recv())
    finally:
        end_all(ranks)
    slower = {
        count: [max(pair) for pair in zip(*(tpot[count] for tpot, _ in answers), strict=True)]
        for count in counts
    }
    return slower, answers[0][1]


def end_all(ranks: list[Any]) -> None:
    """End the ranks and the engine processes that they started."""
    import psutil

    for rank in ranks:
        rank.join(20)
        if rank.pid is not None and psutil.pid_exists(rank.pid):
            for process in psutil.Process(rank.pid).children(recursive=True):
                process.kill()
        rank.kill()


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--requests", type=integers, default=[4, 8], help="at a time, per rank")
    arguments.add_argument("--repetitions", type=int, default=5)
    arguments.add_argument("--tiny", action="store_true", help="a toy model, to try the benchmark")
    given = arguments.parse_args()
    variants = {"unsharded": [], **{name: [name] for name in COMPONENTS}, "all four": [*COMPONENTS]}
    variants["unsharded, again"] = []
    shape = MODEL | (TINY if given.tiny else {})
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="fgtp_vllm_") as folder:
        Path(folder, "config.json").write_text(json.dumps(shape))
        for name, components in variants.items():
            results[name] = run_variant(folder, components, given.requests, given.repetitions)
            print(f"{name}: done", flush=True)
    rows, records = [], []
    for count in given.requests:
        base = results["unsharded"][0][count] + results["unsharded, again"][0][count]
        for name, (tpot, (freed, resident)) in results.items():
            change = spread(tpot[count])["median"] - spread(base)["median"]
            throughput = count / (spread(tpot[count], 1.0)["median"])
            rows.append(
                [
                    count,
                    name,
                    shown(spread(tpot[count])),
                    f"{change:+.1f}",
                    f"{ratio(base, tpot[count]):.2f}",
                    f"{throughput:.1f}",
                    f"{freed / 2**20:.0f}",
                    f"{resident / 2**20:.0f}",
                ]
            )
            records.append(
                {
                    "requests_per_rank": count,
                    "variant": name,
                    "tpot_milliseconds": spread(tpot[count]),
                    "tpot_change_milliseconds": change,
                    "unsharded_over_this": ratio(base, tpot[count]),
                    "tokens_per_second_per_rank": throughput,
                    "weight_bytes_freed_per_rank": freed,
                    "resident_bytes": resident,
                }
            )
    report(
        f"vLLM, {WORLD} data-parallel ranks, fp32: TPOT of the slower rank, median [p10-p90]",
        ["requests/rank", "sharded", "TPOT ms", "change ms", "unsharded/this", "tokens/s/rank",
         "MiB freed", "MiB resident"],
        rows,
        {"benchmark": "vllm_decode", "machine": machine(), "model": shape, "results": records},
        given.output,
    )  # fmt: skip


if __name__ == "__main__":
    main()

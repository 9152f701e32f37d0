"""Steady decode in real vLLM, two data-parallel ranks: unsharded against each component and all.

Every rank is a process with an engine of its own (the SPMD way), on one core, on a Llama-like
model with random weights (`load_format="dummy"`), fp32, compiled with Inductor. A rank decodes
`--requests` requests at a time; the time per output token (TPOT) is the difference of a long and a
short `generate`, by the difference of their tokens, which leaves prefill, start and end out, on the
rank where it is longer.

The unsharded engines stay; those of a variant are started beside them, and the two take turns.
Changes and ratios are those of such a pair. `none` pairs unsharded with unsharded. Weight bytes
freed per rank are those of the plan in force; resident memory is that of the worker process.
"""

import functools
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common import Times, free_port, integers, machine, parser, pin, ratio, report, shown, spread

WORLD = 2
COMPONENTS = ("embedding", "lmhead", "oproj", "mlp")
# "none" is the control: a second unsharded engine, so that it shows the benchmark's own bias
VARIANTS = {"none": (), **{name: (name,) for name in COMPONENTS}, "all four": COMPONENTS}
SHORT, LONG = 4, 36  # tokens of a request
START_SECONDS, ANSWER_SECONDS = 600, 120
MOST_REQUESTS = 32
REST = 1.5  # seconds; a worker without work spins for one before it sleeps
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


def rank_main(rank: int, port: int, model: str, components: Sequence[str], pipe: Any) -> None:
    """One rank of one variant: says what it holds, then times what it is asked for."""
    pin(rank)
    os.environ.update(ENVIRONMENT)
    # stock vLLM runs the ranks of a dense model as engines of their own
    world, place = (WORLD, rank) if components else (1, 0)
    os.environ |= {"VLLM_DP_RANK": str(place), "VLLM_DP_RANK_LOCAL": str(place)}
    os.environ |= {"VLLM_DP_SIZE": str(world), "VLLM_DP_MASTER_IP": "127.0.0.1"}
    os.environ["VLLM_DP_MASTER_PORT"] = str(port)
    from vllm import LLM, SamplingParams

    options: dict[str, Any] = {}
    if components:
        sizes = {f"{component}_tensor_parallel_size": WORLD for component in components}
        options["compilation_config"] = {"passes": ["fgtp"]}
        options["additional_config"] = {"finegrained_tp_config": sizes}
    engine = LLM(
        model,
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=128,
        max_num_seqs=MOST_REQUESTS,
        enable_prefix_caching=False,
        **options,
    )
    pipe.send(engine.collective_rpc(held)[0])
    while (asked := pipe.recv()) is not None:
        count, tokens = asked
        prompts: Any = [{"prompt_token_ids": [7 + i] * 8} for i in range(count)]
        sampling = SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False
        )
        start = time.perf_counter()
        engine.generate(prompts, sampling, use_tqdm=False)
        pipe.send(time.perf_counter() - start)


class Engines:
    """The ranks of one variant. freed, resident: bytes of the first rank, once it is up."""

    def __init__(self, model: str, components: Sequence[str]):
        context = multiprocessing.get_context("spawn")
        port, self._ranks, self._pipes = free_port(), [], []
        self._name = " and ".join(components) or "unsharded"
        for rank in range(WORLD):
            ours, theirs = context.Pipe()
            arguments = (rank, port, model, components, theirs)
            self._ranks.append(context.Process(target=rank_main, args=arguments))
            self._ranks[-1].start()
            self._pipes.append(ours)

    def wait_until_up(self) -> None:
        self.freed, self.resident = self._answers(START_SECONDS)[0]

    def seconds_per_token(self, count: int) -> float:
        """The TPOT of `count` requests per rank, on the slower rank."""
        taken = []
        for tokens in (SHORT, LONG):
            for pipe in self._pipes:
                pipe.send((count, tokens))
            taken.append(self._answers(ANSWER_SECONDS))
        time.sleep(REST)
        short, long = taken
        return max(b - a for a, b in zip(short, long, strict=True)) / (LONG - SHORT)

    def _answers(self, limit: float) -> list[Any]:
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(limit):
                raise SystemExit(f"rank {rank} of {self._name} did not answer in {limit:g} s")
        return [pipe.recv() for pipe in self._pipes]

    def end(self) -> None:
        """End the ranks, and the engine processes that they started."""
        import psutil

        for rank in self._ranks:
            if rank.pid is not None and psutil.pid_exists(rank.pid):
                for process in psutil.Process(rank.pid).children(recursive=True):
                    process.kill()
            rank.kill()
            rank.join(20)


@contextmanager
def engines(model: str, components: Sequence[str]) -> Iterator[Engines]:
    started = Engines(model, components)
    try:
        started.wait_until_up()
        yield started
    finally:
        started.end()


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--requests", type=integers, default=[4, 8], help="at a time, per rank")
    arguments.add_argument("--repetitions", type=int, default=7)
    arguments.add_argument("--tiny", action="store_true", help="a toy model, to try the benchmark")
    given = arguments.parse_args()
    shape = MODEL | (TINY if given.tiny else {})
    rows, records = [], []
    with tempfile.TemporaryDirectory(prefix="fgtp_vllm_") as folder:
        Path(folder, "config.json").write_text(json.dumps(shape))
        with engines(folder, ()) as unsharded:
            for name, components in VARIANTS.items():
                with engines(folder, components) as variant:
                    pair = {"unsharded": unsharded, name: variant}
                    for count in given.requests:
                        steps = {
                            key: functools.partial(one.seconds_per_token, count)
                            for key, one in pair.items()
                        }
                        times = take_turns(steps, given.repetitions)
                        records.append(record(name, count, times, variant))
                        rows.append(row(records[-1]))
                print(f"{name}: done", flush=True)
    report(
        f"vLLM, {WORLD} data-parallel ranks, fp32: TPOT of the slower rank, median [p10-p90]",
        ["requests/rank", "sharded", "unsharded ms", "this ms", "change ms", "unsharded/this",
         "tokens/s/rank", "MiB freed", "MiB resident"],
        sorted(rows, key=lambda row: row[0]),
        {"benchmark": "vllm_decode", "machine": machine(), "model": shape, "results": records},
        given.output,
    )  # fmt: skip


def take_turns(steps: dict[str, Any], repetitions: int) -> Times:
    """What each step returns, in turn; the first turn, which warms up, is left out."""
    times: Times = {name: [] for name in steps}
    for turn in range(repetitions + 1):
        for name, step in steps.items():
            taken = step()
            if turn:
                times[name].append(taken)
    return times


def record(name: str, count: int, times: Times, variant: Engines) -> dict[str, Any]:
    changes = [b - a for a, b in zip(times["unsharded"], times[name], strict=True)]
    return {
        "requests_per_rank": count,
        "variant": name,
        "unsharded_milliseconds": spread(times["unsharded"]),
        "tpot_milliseconds": spread(times[name]),
        "tpot_change_milliseconds": spread(changes),
        "unsharded_over_this": ratio(times["unsharded"], times[name]),
        "tokens_per_second_per_rank": count / spread(times[name], 1.0)["median"],
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

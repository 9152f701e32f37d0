"""Real vLLM engines for benchmarks: two data-parallel ranks, unsharded or with the pass.

Every rank is a process with an engine of its own (the SPMD way), on one core, on a Llama-like
model with random weights (`load_format="dummy"`), fp32, compiled with Inductor. It runs the
functions that it is sent, with the engine as their first argument.
"""

import json
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common import free_port, pin

WORLD = 2
COMPONENTS = ("embedding", "lmhead", "oproj", "mlp")
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
    components: Sequence[str],
    options: Mapping[str, Any],
    pipe: Any,
) -> None:
    """One rank of one variant: says what it holds, then runs what it is sent.

    options: for `LLM`.
    """
    pin(rank)
    os.environ.update(ENVIRONMENT)
    # stock vLLM runs the ranks of a dense model as engines of their own
    world, place = (WORLD, rank) if components else (1, 0)
    os.environ |= {"VLLM_DP_RANK": str(place), "VLLM_DP_RANK_LOCAL": str(place)}
    os.environ |= {"VLLM_DP_SIZE": str(world), "VLLM_DP_MASTER_IP": "127.0.0.1"}
    os.environ["VLLM_DP_MASTER_PORT"] = str(port)
    from vllm import LLM

    sharding: dict[str, Any] = {}
    if components:
        sizes = {f"{component}_tensor_parallel_size": WORLD for component in components}
        sharding["compilation_config"] = {"passes": ["fgtp"]}
        sharding["additional_config"] = {"finegrained_tp_config": sizes}
    engine = LLM(
        model,
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="float32",
        enable_prefix_caching=False,
        **options,
        **sharding,
    )
    pipe.send(engine.collective_rpc(held)[0])
    while (asked := pipe.recv()) is not None:
        function, arguments = asked
        pipe.send(function(engine, *arguments))


class Engines:
    """The ranks of one variant. freed, resident: bytes of the first rank, once it is up."""

    def __init__(self, model: str, components: Sequence[str], options: Mapping[str, Any]):
        context = multiprocessing.get_context("spawn")
        port, self._ranks, self._pipes = free_port(), [], []
        self._name = " and ".join(components) or "unsharded"
        for rank in range(WORLD):
            ours, theirs = context.Pipe()
            arguments = (rank, port, model, components, options, theirs)
            self._ranks.append(context.Process(target=rank_main, args=arguments))
            self._ranks[-1].start()
            self._pipes.append(ours)

    def wait_until_up(self) -> None:
        self.freed, self.resident = self._answers(START_SECONDS)[0]

    def run(
        self, function: Callable[..., Any], arguments: Sequence[Sequence[Any]], limit: float
    ) -> list[Any]:
        """What the function gives on each rank. arguments: by rank. limit: in seconds."""
        for pipe, own in zip(self._pipes, arguments, strict=True):
            pipe.send((function, tuple(own)))
        return self._answers(limit)

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
def engines(model: str, components: Sequence[str], options: Mapping[str, Any]) -> Iterator[Engines]:
    started = Engines(model, components, options)
    try:
        started.wait_until_up()
        yield started
    finally:
        started.end()


def pairs(
    model: str, variants: Mapping[str, Sequence[str]], options: Mapping[str, Any]
) -> Iterator[tuple[str, Engines, Engines]]:
    """By variant its name, engines without the pass, which stay, and those with its components."""
    with engines(model, (), options) as unsharded:
        for name, components in variants.items():
            with engines(model, components, options) as variant:
                yield name, unsharded, variant
            print(f"{name}: done", flush=True)


@contextmanager
def model_folder(tiny: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """A folder with the configuration of the model, and what it says."""
    shape = MODEL | (TINY if tiny else {})
    with tempfile.TemporaryDirectory(prefix="fgtp_vllm_") as folder:
        Path(folder, "config.json").write_text(json.dumps(shape))
        yield folder, shape


def take_turns(
    measure: Callable[[Engines], Any], both: Sequence[Engines], repetitions: int
) -> list[list[Any]]:
    """What is measured of each, in turn; the first turn, which warms up, is left out."""
    turns = [[measure(one) for one in both] for _ in range(repetitions + 1)]
    return [list(of_one) for of_one in zip(*turns[1:], strict=True)]

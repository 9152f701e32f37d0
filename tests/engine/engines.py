"""Real vLLM engines for tests: SPMD ranks, each a fork that runs one job and ends."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from fork_server import Fork, ForkServer, fork_processes, session
from ranks import HANG, Outcome, Pool, RankFailure, RankTimeout, free_port

COMPONENTS = ("embedding", "lmhead", "oproj", "mlp")
TWO_STAGES: dict[str, Any] = {
    "pipeline_parallel_size": 2,
    # as with VLLM_CPU_CI_ENV, without which vLLM warms up: it must have, to receive from a stage
    "compilation_config": {"mode": 2, "backend": "eager", "ir_enable_torch_wrap": False},
}
WARMED_UP: dict[str, str | None] = {"VLLM_CPU_CI_ENV": None}


@dataclass(frozen=True)
class Job:
    """What one engine does.

    prompts: token ids by the prompt's number. options: for `LLM`. environment: on top of the fork
    server's, None to unset. run: in the place of `generate`. processes: whether the engine core is
    one of its own, and how it starts.
    """

    model: str
    prompts: Mapping[int, Sequence[int]]
    options: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str | None] = field(default_factory=dict)
    sampling: Mapping[str, Any] = field(default_factory=dict)
    run: Callable[..., Any] | None = None
    processes: Literal["none", "fork", "spawn"] = "none"


@dataclass(frozen=True)
class Answer:
    """tokens: by the prompt's number. logprobs: per position, of the likeliest tokens. prompts: the
    same of the prompt, where it was asked for.

    found: what `probe` says of the model in each worker.
    """

    tokens: dict[int, list[int]]
    logprobs: dict[int, list[dict[int, float]]]
    found: list[dict[str, Any]]
    prompts: dict[int, list[dict[int, float]]] = field(default_factory=dict)


def shared(*components: str, size: int = 2, **more: Any) -> dict[str, Any]:
    """The options that shard `components` (all four unless told) over `size` ranks."""
    sizes = {f"{name}_tensor_parallel_size": size for name in components or COMPONENTS}
    return {
        "compilation_config": {"passes": ["fgtp"]},
        "additional_config": {"finegrained_tp_config": sizes} | more,
    }


def merged(*options: Mapping[str, Any]) -> dict[str, Any]:
    """All of the options for `LLM`; those of compilation_config are joined key by key."""
    every: dict[str, Any] = {}
    for given in options:
        compilation = every.get("compilation_config", {}) | given.get("compilation_config", {})
        every |= given | ({"compilation_config": compilation} if compilation else {})
    return every


def set_environment(job: Job, rank: int = 0, world: int = 1, port: int = 0) -> None:
    """That of the job, and of its rank in the data-parallel group."""
    given: dict[str, str | None] = dict(job.environment)
    if job.processes == "none":
        given["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    elif job.processes == "fork":
        fork_processes()
    if world > 1:
        group = {"RANK": rank, "RANK_LOCAL": rank, "SIZE": world}
        group |= {"MASTER_IP": "127.0.0.1", "MASTER_PORT": port}
        given |= {f"VLLM_DP_{key}": str(value) for key, value in group.items()}
    for key, value in given.items():
        os.environ.pop(key, None) if value is None else os.environ.update({key: value})
    logger = logging.getLogger("vllm")
    for one in (logger, *logger.handlers):
        one.setLevel(os.environ["VLLM_LOGGING_LEVEL"])


def engine_arguments(job: Job) -> dict[str, Any]:
    """Those of a small engine, and the job's."""
    in_process = {"distributed_executor_backend": "uni"} if job.processes == "none" else {}
    return (
        {
            "model": job.model,
            "skip_tokenizer_init": True,
            "dtype": "float32",
            "max_model_len": 128,
            "max_num_seqs": 8,
            "kv_cache_memory_bytes": 64 << 20,
            "disable_log_stats": True,
        }
        | in_process
        | dict(job.options)
    )


def start(job: Job, rank: int = 0, world: int = 1, port: int = 0) -> Any:
    """The engine of one rank, in this process or below it."""
    set_environment(job, rank, world, port)
    from vllm import LLM

    return LLM(**engine_arguments(job))


def sampling(number: int, **more: Any) -> Any:
    """Greedy, as many tokens as prompt `number` gets, the three likeliest at each."""
    from vllm import SamplingParams

    given = {
        "temperature": 0,
        "max_tokens": tokens_of(number),
        "detokenize": False,
        "ignore_eos": True,
        "logprobs": 3,
    }
    return SamplingParams(**(given | more))


def generate(llm: Any, job: Job) -> Answer:
    """Greedy tokens of the job's prompts, and what the model looks like."""
    numbers = sorted(job.prompts)
    outputs = llm.generate(
        [{"prompt_token_ids": list(job.prompts[i])} for i in numbers],
        [sampling(i, **job.sampling) for i in numbers],
        use_tqdm=False,
    )
    return answer_of(dict(zip(numbers, outputs, strict=True)), llm.apply_model(probe))


def answer_of(outputs: Mapping[int, Any], found: list[dict[str, Any]]) -> Answer:
    """From what vLLM gave for each prompt, and what `probe` said."""
    first = {i: output.outputs[0] for i, output in outputs.items()}
    return Answer(
        tokens={i: list(out.token_ids) for i, out in first.items()},
        logprobs={
            i: [{t: p.logprob for t, p in at.items()} for at in out.logprobs or ()]
            for i, out in first.items()
        },
        found=found,
        prompts={
            i: [{t: p.logprob for t, p in (at or {}).items()} for at in output.prompt_logprobs]
            for i, output in outputs.items()
            if output.prompt_logprobs
        },
    )


def tokens_of(number: int) -> int:
    """How many tokens are made of prompt `number`: different counts, so that ranks fall idle."""
    return 6 + 3 * (number % 4)


def probe(model: Any) -> dict[str, Any]:
    """Runs in a worker: the bytes of the weights that it holds, and the plan it followed."""
    plan = getattr(model, "fgtp_plan", None)
    return {
        "bytes": model.weight_bytes,
        "memory": getattr(model, "load_memory", None),
        "saved": plan.bytes_saved_per_rank if plan is not None else 0,
        "sites": [
            (site.component, site.group_size, sorted(weight.fqn for weight in site.weights))
            for site in (plan.sites if plan is not None else ())
        ],
    }


def run_rank(jobs: Sequence[Job], port: int) -> Any:
    """Start the engine of this rank, and run its job."""
    rank = int(os.environ["FGTP_TEST_RANK"])
    llm = start(jobs[rank], rank, len(jobs), port)
    return (jobs[rank].run or generate)(llm, jobs[rank])


class _Forks(Pool):
    """`world` forks. Ends with all that they started."""

    def __init__(self, world: int, server: ForkServer, logs: Sequence[Path]):
        self._server, self._logs = server, logs
        super().__init__(world)

    def _start(self, rank: int, pipe: Connection) -> Fork:
        return self._server.fork(pipe, self._logs[rank], self._dump(rank), rank)

    def _stacks(self) -> str:
        for leader in self._processes:
            for process in session(leader.pid):
                if process.pid != leader.pid:
                    process.send_signal(signal.SIGUSR1)  # see fgtp_test_plugin
        return super()._stacks()


class Engines:
    """Calls on `world` processes at once, forked for the call. They end when all have answered."""

    def __init__(self, world: int, server: Callable[[], ForkServer], folder: Path):
        self._world, self._server, self._folder = world, server, folder
        self._calls = 0

    def __call__(self, *jobs: Job, timeout: float = HANG) -> list[Any]:
        """One job per rank; what each gave. Raises with all logs if one failed or took longer."""
        return self.run(run_rank, jobs, free_port(), timeout=timeout)

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = HANG) -> list[Any]:
        outcomes = self.outcomes(function, *args, timeout=timeout)
        failed = [
            f"--- rank {rank}: {o.trace or o.error}\n--- its log\n{self.log(rank)[-20000:]}"
            for rank, o in enumerate(outcomes)
            if o.error
        ]
        if failed:
            raise RankFailure("\n".join(failed))
        return [o.value for o in outcomes]

    def outcomes(
        self,
        function: Callable[..., Any],
        *args: Any,
        timeout: float = HANG,
        awaited: Sequence[int] | None = None,
    ) -> list[Outcome]:
        """What happened on each rank, or on those awaited. Raises RankTimeout, with all logs, after
        `timeout`.
        """
        self._calls += 1
        forks = _Forks(self._world, self._server(), [self._log(r) for r in range(self._world)])
        try:
            return forks.outcomes(function, *args, timeout=timeout, awaited=awaited)
        except RankTimeout as error:
            logs = [f"--- log of rank {r}\n{self.log(r)[-20000:]}" for r in range(self._world)]
            raise RankTimeout("\n".join([str(error), *logs])) from None
        finally:
            forks.close()

    def _log(self, rank: int) -> Path:
        return self._folder / f"call{self._calls}.rank{rank}.log"

    def log(self, rank: int) -> str:
        """What the rank and its processes printed in the last call."""
        log = self._log(rank)
        return log.read_text(errors="replace") if log.exists() else ""

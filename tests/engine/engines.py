"""Real vLLM engines for tests: SPMD ranks, each a process that starts the engines it is asked for.

A rank is a session of its own, so that whatever vLLM leaves behind is found and ended by pid.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
from ranks import Pool, free_port, serve_calls

HERE = Path(__file__).parent
CPU_MOE = HERE.parent.parent / "examples" / "cpu_moe_plugin"  # what vLLM's CPU build lacks
WAIT_FOR_OTHERS = 120.0  # seconds; an engine that ends takes its data-parallel group with it
COMPONENTS = ("embedding", "lmhead", "oproj", "mlp")
# Dynamo and eager in the place of Inductor, one thread, no tcmalloc or libiomp
ENVIRONMENT = {
    "VLLM_CPU_CI_ENV": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_LOGGING_LEVEL": "INFO",
    "VLLM_PROCESS_NAME_PREFIX": "fgtp_test",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # for `probe`
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONFAULTHANDLER": "1",
}


@dataclass(frozen=True)
class Job:
    """What one engine does.

    prompts: token ids by the prompt's number. lengths: how many tokens to make of each.
    options: for `LLM`. environment: on top of ENVIRONMENT, None to unset.
    """

    model: str
    prompts: Mapping[int, Sequence[int]]
    options: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str | None] = field(default_factory=dict)
    sampling: Mapping[str, Any] = field(default_factory=dict)
    run: Callable[..., Any] | None = None  # in the place of `generate`


@dataclass(frozen=True)
class Answer:
    """tokens: by the prompt's number. logprobs: per position, of the likeliest tokens.

    found: what `probe` says of the model in each worker.
    """

    tokens: dict[int, list[int]]
    logprobs: dict[int, list[dict[int, float]]]
    found: list[dict[str, Any]]


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


_clean: dict[str, str] = {}


def set_environment(job: Job, rank: int = 0, world: int = 1, port: int = 0) -> None:
    """That of the job in the place of whatever the job before has set."""
    if not _clean:
        _clean.update(os.environ)
    os.environ.clear()
    for key, value in {**_clean, **ENVIRONMENT, **job.environment}.items():
        os.environ.pop(key, None) if value is None else os.environ.update({key: value})
    if world > 1:
        for key, value in {
            "RANK": rank,
            "RANK_LOCAL": rank,
            "SIZE": world,
            "MASTER_IP": "127.0.0.1",
            "MASTER_PORT": port,
        }.items():
            os.environ[f"VLLM_DP_{key}"] = str(value)


def engine_arguments(job: Job) -> dict[str, Any]:
    """Those of a small engine, and the job's."""
    return {
        "model": job.model,
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "max_model_len": 128,
        "max_num_seqs": 8,
        "kv_cache_memory_bytes": 64 << 20,
        "disable_log_stats": True,
    } | dict(job.options)


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
    """Start the engine of this rank, run its job, and end the engine when all ranks are done."""
    rank, job = int(os.environ["FGTP_TEST_RANK"]), jobs[int(os.environ["FGTP_TEST_RANK"])]
    folder = Path(os.environ["FGTP_TEST_FOLDER"])
    try:
        llm = start(job, rank, len(jobs), port)
    except BaseException:
        (folder / f"done.{port}.{rank}").touch()
        raise
    try:
        return (job.run or generate)(llm, job)
    finally:
        (folder / f"done.{port}.{rank}").touch()
        deadline = time.monotonic() + WAIT_FOR_OTHERS
        while len(list(folder.glob(f"done.{port}.*"))) < len(jobs) and time.monotonic() < deadline:
            time.sleep(0.05)
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        if os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "0":
            from vllm.distributed import cleanup_dist_env_and_memory

            cleanup_dist_env_and_memory()


class Engines(Pool):
    """`world` ranks of one data-parallel group, which run job after job."""

    def __init__(self, world: int, folder: Path):
        self._logs = [folder / f"rank{rank}.log" for rank in range(world)]
        super().__init__(world, serve=_Serve(str(folder)), daemon=False)

    def __call__(self, *jobs: Job, timeout: float = 240) -> list[Any]:
        """One job per rank; what each gave. Raises with all logs if one failed or took longer."""
        return self.run(run_rank, jobs, free_port(), timeout=timeout)

    def run(self, *args: Any, **kwargs: Any) -> list[Any]:
        marks = [log.stat().st_size if log.exists() else 0 for log in self._logs]
        try:
            return super().run(*args, **kwargs)
        except AssertionError as error:
            logs = "\n".join(
                f"--- log of rank {rank}\n{log.read_text(errors='replace')[mark:][-20000:]}"
                for rank, (log, mark) in enumerate(zip(self._logs, marks, strict=True))
            )
            self.kill()
            raise type(error)(f"{error}\n{logs}") from None

    def log(self, rank: int) -> str:
        log = self._logs[rank]
        return log.read_text(errors="replace") if log.exists() else ""

    def sessions(self) -> list[psutil.Process]:
        """Every process of every rank."""
        return [p for process in self._processes for p in session(process.pid)]

    def _stacks(self) -> str:
        for process in self.sessions():
            if process.pid in [p.pid for p in self._processes]:
                continue
            os.kill(process.pid, signal.SIGUSR1)  # see fgtp_test_plugin
        return super()._stacks()

    def kill(self) -> None:
        """Ends whatever the ranks started, and the ranks."""
        mine = self.sessions()
        super().kill()
        for process in mine:
            if process.is_running():
                process.kill()
        psutil.wait_procs(mine, timeout=10)


def session(leader: int | None) -> list[psutil.Process]:
    """The processes of the session that `leader` began."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == leader:
                found.append(process)
        except ProcessLookupError:
            continue
    return found


@dataclass(frozen=True)
class _Serve:
    """What a rank runs, with all it and its children print in rank<n>.log."""

    folder: str

    def __call__(self, rank: int, world: int, port: int, pipe: Connection, dump: str) -> None:
        os.setsid()
        log = os.open(f"{self.folder}/rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(log, stream)
        with open(dump, "w") as dump_file:
            faulthandler.register(signal.SIGUSR1, file=dump_file, all_threads=True)
            os.environ |= {
                "FGTP_TEST_RANK": str(rank),
                "FGTP_TEST_PID": str(os.getpid()),
                "FGTP_TEST_FOLDER": self.folder,
                "FGTP_CACHE_DIR": f"{self.folder}/cache",
            }
            paths = [str(path) for path in (HERE, HERE.parent, CPU_MOE, self.folder)]
            sys.path[:0] = paths
            os.environ["PYTHONPATH"] = os.pathsep.join(
                [*paths, *filter(None, [os.environ.get("PYTHONPATH")])]
            )
            serve_calls(pipe)


def install_test_plugin(folder: Path) -> None:
    """A distribution in `folder` by which every vLLM process loads fgtp_test_plugin."""
    info = folder / "fgtp_test_plugin-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fgtp-test-plugin\nVersion: 0\n")
    (info / "entry_points.txt").write_text(
        "[vllm.general_plugins]\nfgtp_test = fgtp_test_plugin:install\n"
    )

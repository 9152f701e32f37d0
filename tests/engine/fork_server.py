"""A process that has imported vLLM once, and forks the processes in which tests start engines.

Importing vLLM takes longer than starting a small engine. What a fork has imported beyond what the
server had, the server imports before the next fork. A fork is a session of its own, so that
whatever vLLM leaves behind is found and ended by pid.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from pathlib import Path
from unittest import mock

import psutil
import vllm_cpu_moe
from ranks import serve_calls

HERE = Path(__file__).parent
EXAMPLES = HERE.parent.parent / "examples"  # vllm_cpu_moe and triton_on_cpus are there
# Dynamo and eager in the place of Inductor, one thread, no tcmalloc or libiomp
ENVIRONMENT = {
    "VLLM_CPU_CI_ENV": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_LOGGING_LEVEL": "INFO",
    "VLLM_PROCESS_NAME_PREFIX": "fgtp_test",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # for `probe`
    "VLLM_NO_USAGE_STATS": "1",
    # seconds; after 5 the server would close a connection just as a rested client uses it again
    "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "600",
    "HF_HUB_OFFLINE": "1",
    "PYTHONFAULTHANDLER": "1",
}
# V2 is what GPUs use by default; here it runs on Triton's interpreter
RUNNERS: dict[str, dict[str, str]] = {
    "v1": {},
    "v2": {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"},
}
# what most engines need, and vLLM imports late
_PRELOADED = (
    "vllm.engine.arg_utils",
    "vllm.entrypoints.llm",
    "vllm.model_executor.models.llama",
    "vllm.v1.engine.core",
    "vllm.v1.executor.uniproc_executor",
    "vllm.v1.worker.cpu_worker",
    "torch._inductor.compile_fx",
)
_LEARNED = ("vllm.", "torch.", "transformers.", "compressed_tensors.", "sympy.")
_NOT_LEARNED = ("vllm.v1.spec_decode.ngram",)  # brings numba, at which vLLM's kernel scan stumbles
_START_SECONDS = 300.0  # until vLLM is imported; a hang if it takes this long


@dataclass(frozen=True)
class Fork:
    """A process that the server forked; no child of this one. Like `multiprocessing.Process`."""

    pid: int
    exitcode = "unknown"  # which only the server is told

    def is_alive(self) -> bool:
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(self.pid).status() != psutil.STATUS_ZOMBIE
        return False

    def kill(self) -> None:
        """With all that it started."""
        for process in session(self.pid):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def join(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while self.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)


def session(leader: int) -> list[psutil.Process]:
    """The processes of the session that `leader` began."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError):
            if os.getsid(process.pid) == leader:
                found.append(process)
    return found


class ForkServer:
    """environment: on top of ENVIRONMENT, for what vLLM reads while it is imported."""

    def __init__(self, folder: Path, environment: Mapping[str, str] | None = None):
        self.log = folder / "server.log"
        install_test_plugins(folder / "plugins")
        self._pipe, there = multiprocessing.Pipe()
        given = ENVIRONMENT | {"FGTP_CACHE_DIR": str(folder / "cache")} | dict(environment or {})
        self._process = multiprocessing.get_context("spawn").Process(
            target=_serve, args=(there, str(folder), given), daemon=False
        )
        self._process.start()
        there.close()

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    def fork(self, pipe: Connection, log: Path, dump: Path, rank: int) -> Fork:
        """A process that answers calls from the other end of `pipe`.

        log: where it and its children print. dump: where it writes its stacks on SIGUSR1.
        """
        self._pipe.send((str(log), str(dump), rank))
        send_handle(self._pipe, pipe.fileno(), self._process.pid)
        if not self._pipe.poll(_START_SECONDS):
            raise AssertionError(f"the server did not come up\n{self.log.read_text()}")
        try:
            return Fork(self._pipe.recv())
        except EOFError:
            raise AssertionError(f"the server ended\n{self.log.read_text()}") from None

    def close(self) -> None:
        self._pipe.close()
        self._process.join(10)
        self._process.kill()


def _serve(pipe: Connection, folder: str, environment: Mapping[str, str]) -> None:
    os.setsid()
    _print_to(f"{folder}/server.log")
    paths = [str(path) for path in (HERE, HERE.parent, EXAMPLES, f"{folder}/plugins")]
    sys.path[:0] = paths
    os.environ.update(environment)
    before = filter(None, [os.environ.get("PYTHONPATH")])
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, *before])
    _import_vllm()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # forks leave no zombies
    learned: list[Connection] = []
    forks: list[Fork] = []
    gc.freeze()
    while True:
        try:
            log, dump, rank = pipe.recv()
            handle = recv_handle(pipe)
        except EOFError:  # the tests are over, or were ended
            for fork in forks:
                fork.kill()
            return
        _import_learned(learned)
        here, there = multiprocessing.Pipe(duplex=False)
        pid = os.fork()
        if pid == 0:
            pipe.close()
            here.close()
            os.environ["FGTP_TEST_RANK"] = str(rank)
            _run_fork(Connection(handle), there, log, dump)
        os.close(handle)
        there.close()
        learned.append(here)
        forks = [fork for fork in forks if fork.is_alive()] + [Fork(pid)]
        pipe.send(pid)


def _import_vllm() -> None:
    import triton_on_cpus

    triton_on_cpus.install()
    import torch

    torch.set_num_threads(1)
    from vllm.platforms.interface import Platform

    # small ops, which each engine would compile anew; not the model, whose backend is read later
    with mock.patch.object(Platform, "simple_compile_backend", "eager"):
        for name in _PRELOADED:
            importlib.import_module(name)
    from vllm.compilation.compiler_interface import get_inductor_factors
    from vllm.model_executor.models import registry
    from vllm.platforms import current_platform

    # kept in the process, or done to it for good: each engine would do it anew
    get_inductor_factors()
    current_platform.register_triton_kernel_overrides()
    type(current_platform).register_triton_kernel_overrides = staticmethod(lambda: None)
    gc.unfreeze = lambda: None  # so that no engine's end collects all that was imported
    registry._run_in_subprocess = lambda function: function()  # a process that imports vLLM


def _import_learned(learned: list[Connection]) -> None:
    for pipe in list(learned):
        with contextlib.suppress(EOFError):
            if not pipe.poll():
                continue
            for name in json.loads(pipe.recv_bytes()):
                learn = name.startswith(_LEARNED) and not name.startswith(_NOT_LEARNED)
                if learn and name not in sys.modules:
                    with contextlib.suppress(ImportError):
                        importlib.import_module(name)
            gc.freeze()
        pipe.close()
        learned.remove(pipe)


def _run_fork(pipe: Connection, learned: Connection, log: str, dump: str) -> None:
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _print_to(log)
    with open(dump, "w") as dump_file:
        faulthandler.register(signal.SIGUSR1, file=dump_file, all_threads=True)
        os.environ["FGTP_TEST_PID"] = str(os.getpid())
        had = set(sys.modules)
        try:
            serve_calls(pipe)
            learned.send_bytes(json.dumps([m for m in sys.modules if m not in had]).encode())
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            os._exit(0)  # without the teardown of an engine that the next fork never sees


def _print_to(log: str) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)


def fork_processes() -> None:
    """Let vLLM fork its processes, as it does on GPUs, in the place of spawning them."""
    fork = multiprocessing.get_context("fork")
    multiprocessing.get_context = lambda _method=None: fork  # type: ignore[assignment]


def install_test_plugins(folder: Path) -> None:
    """Distributions in `folder` by which every vLLM process loads vllm_cpu_moe and
    fgtp_test_plugin.
    """
    vllm_cpu_moe.register(folder)
    info = folder / "fgtp_test_plugin-0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fgtp-test-plugin\nVersion: 0\n")
    (info / "entry_points.txt").write_text(
        "[vllm.general_plugins]\nfgtp_test = fgtp_test_plugin:install\n"
    )

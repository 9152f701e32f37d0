"""Real ranks for tests: a pool of processes over gloo on this machine, each call time-limited.

Ranks are kept and reused; a pool that timed out or lost a rank is thrown away. Importing torch and
transformers costs a rank seconds, so one process imports them and ranks are forked from it.
"""

import contextlib
import faulthandler
import multiprocessing
import os
import random
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

HANG = 1200.0  # seconds; what takes a minute alone, and ten on a busy machine, hangs by then
AFTER_AN_ERROR = 240.0  # seconds in which the other ranks of a call must end, too
# what ranks are forked from has imported these; none of them starts a thread
PRELOADED = [
    *("torch._dynamo", "torch._functorch.aot_autograd", "torch._inductor.utils", "networkx"),
    *("transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama"),
    *("transformers.cache_utils", "fgtp_pass.backend.backend"),
]


@dataclass(frozen=True)
class Outcome:
    """What a call did on one rank: a value, or the error's class name, message and traceback."""

    value: Any = None
    error: str = ""
    message: str = ""
    trace: str = ""


class RankFailure(AssertionError):
    """A call raised on some rank."""


class RankTimeout(AssertionError):
    """A call did not end in time; the message holds every rank's stack."""


def free_port() -> int:
    """A port that is free, outside the range from which the kernel gives ports to connections."""
    while True:
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", random.SystemRandom().randrange(10000, 32000)))
            return int(s.getsockname()[1])


def _serve(rank: int, world: int, store: str, pipe: Connection, dump: str) -> None:
    with open(dump, "w") as dump_file:
        faulthandler.register(signal.SIGUSR1, file=dump_file, all_threads=True)
        faulthandler.enable(file=dump_file)
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        os.environ["FGTP_TEST_RANK"] = str(rank)
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=HANG),
        )
        serve_calls(pipe)
        dist.destroy_process_group()


def serve_calls(pipe: Connection) -> None:
    """Answer the calls of a `Pool`, until it says None or is gone."""
    while True:
        try:
            call = pipe.recv()
        except EOFError:
            return
        if call is None:
            return
        function, args, kwargs = call
        if "torch" in sys.modules:
            sys.modules["torch"]._dynamo.reset()
        try:
            outcome = Outcome(value=function(*args, **kwargs))
        except BaseException as error:
            outcome = Outcome(
                error=type(error).__name__, message=str(error), trace=traceback.format_exc()
            )
        pipe.send(outcome)


class Pool:
    """`world` ranks that run the same function at the same time.

    method: how a rank is started: "spawn", or "forkserver", with `PRELOADED` imported.
    """

    def __init__(self, world: int, method: str = "spawn"):
        self.world = world
        self._method = method
        self._folder = tempfile.TemporaryDirectory()
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        for rank in range(world):
            here, there = multiprocessing.Pipe()
            self._processes.append(self._start(rank, there))
            there.close()
            self._pipes.append(here)

    def _start(self, rank: int, pipe: Connection) -> Any:
        """A process that answers the calls that come through the pipe."""
        context: Any = multiprocessing.get_context(self._method)
        if self._method == "forkserver":
            context.set_forkserver_preload(PRELOADED)
        store = f"{self._folder.name}/store"
        arguments = (rank, self.world, store, pipe, str(self._dump(rank)))
        process = context.Process(target=_serve, args=arguments, daemon=True)
        process.start()
        return process

    def _dump(self, rank: int) -> Path:
        return Path(self._folder.name) / f"rank{rank}.txt"

    @property
    def alive(self) -> bool:
        return bool(self._processes) and all(p.is_alive() for p in self._processes)

    def outcomes(
        self,
        function: Callable[..., Any],
        *args: Any,
        timeout: float = HANG,
        awaited: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> list[Outcome]:
        """Call on every rank; what happened on each, or on those that are awaited.

        Raises RankTimeout after `timeout` seconds, or `AFTER_AN_ERROR` seconds after a rank raised.
        """
        for pipe in self._pipes:
            pipe.send((function, args, kwargs))
        outcomes: dict[int, Outcome] = {}
        ranks = range(self.world) if awaited is None else awaited
        deadline = time.monotonic() + timeout
        while pending := {self._pipes[i]: i for i in ranks if i not in outcomes}:
            ready = wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                stacks = self._stacks()
                self.kill()
                failed = [
                    f"--- rank {i}: {o.trace or o.error}" for i, o in outcomes.items() if o.error
                ]
                raise RankTimeout(
                    f"no end in time on ranks {sorted(pending.values())}\n{stacks}"
                    + "\n".join(failed)
                )
            for pipe in ready:
                try:
                    outcomes[pending[pipe]] = pipe.recv()
                except EOFError:
                    outcomes[pending[pipe]] = self._death(pending[pipe])
                if outcomes[pending[pipe]].error:
                    deadline = min(deadline, time.monotonic() + AFTER_AN_ERROR)
        return [outcomes[i] for i in ranks]

    def run(
        self, function: Callable[..., Any], *args: Any, timeout: float = HANG, **kwargs: Any
    ) -> list[Any]:
        """Call on every rank; the values by rank. Raises RankFailure if any rank raised."""
        outcomes = self.outcomes(function, *args, timeout=timeout, **kwargs)
        if any(o.error for o in outcomes):
            raise RankFailure(
                "\n".join(
                    f"--- rank {rank}: {o.trace or o.error}"
                    for rank, o in enumerate(outcomes)
                    if o.error
                )
            )
        return [o.value for o in outcomes]

    def _death(self, rank: int) -> Outcome:
        """Of a process that is gone; with its last stack, if a signal ended it that has one."""
        process = self._processes[rank]
        process.join(10)
        message = f"ended with exit code {process.exitcode}"
        stack = f"RankDied: {message}\n{self._dump(rank).read_text()}"
        return Outcome(error="RankDied", message=message, trace=stack)

    def _stacks(self) -> str:
        for process in self._processes:
            if process.is_alive() and process.pid:
                os.kill(process.pid, signal.SIGUSR1)
        time.sleep(1)
        return "\n".join(
            f"--- rank {rank}\n{self._dump(rank).read_text()}" for rank in range(self.world)
        )

    def kill(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join(10)
        self._processes = []

    def close(self) -> None:
        if not self.alive:
            return self.kill()
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(10)
        self.kill()


class Pools:
    """One pool per world size, made when asked for and again when broken."""

    def __init__(self) -> None:
        self._pools: dict[int, Pool] = {}

    def __call__(self, world: int) -> Pool:
        pool = self._pools.get(world)
        if pool is None or not pool.alive:
            if pool is not None:
                pool.kill()
            self._pools[world] = Pool(world, method="forkserver")
        return self._pools[world]

    def close(self) -> None:
        for pool in self._pools.values():
            pool.close()


if __name__ == "__main__":
    sys.exit("ranks.py holds helpers for the tests; run pytest")

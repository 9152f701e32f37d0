"""`vllm serve` in tests: the real command, in a process that is forked from one with vLLM."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path

from fork_server import Fork, ForkServer, fork_processes
from ranks import HANG, free_port
from two_hosts import Host

_SMALL = (
    *("--dtype", "float32", "--max-model-len", "128", "--max-num-seqs", "8"),
    *("--kv-cache-memory-bytes", str(64 << 20), "--skip-tokenizer-init"),
)


@dataclass(frozen=True)
class Served:
    """A running command. pipe: says when it has ended. url: of its API, with /v1. log: what it has
    printed.
    """

    process: Fork
    pipe: Connection
    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def wait_until_up(self) -> None:
        deadline = time.monotonic() + HANG
        while not self.pipe.poll() and time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        raise AssertionError(
            f"the server did not come up: {self._why()}\n{self.log.read_text()[-20000:]}"
        )

    def wait_until_over(self, seconds: float) -> None:
        """Until the command has ended; then its process ends too, as it would without tests."""
        if self.pipe.poll(seconds):
            self.pipe.close()

    def _why(self) -> str:
        if not self.pipe.poll():
            return "it takes too long"
        try:
            return str(self.pipe.recv())
        except EOFError:
            return "it was killed"


def _command(arguments: Sequence[str], environment: Mapping[str, str], host: Host | None) -> None:
    from vllm.entrypoints.cli.main import main

    if host is not None:
        host.be()
    fork_processes()
    resource_tracker._resource_tracker.__init__()  # its own, which tidies up when the command ends
    resource_tracker.ensure_running()
    os.environ.update(environment)
    sys.argv = ["vllm", *arguments]
    main()


@contextmanager
def serving(
    server: ForkServer,
    folder: Path,
    model: str,
    *arguments: str,
    environment: Mapping[str, str] | None = None,
    host: Host | None = None,
    answers: bool = True,
) -> Iterator[Served]:
    """`vllm serve MODEL ARGUMENTS`, up and running. Ends it, and all its processes.

    host: where it runs. answers: whether to wait until its API is up.
    """
    folder.mkdir(parents=True, exist_ok=True)
    here, there = multiprocessing.Pipe()
    process = server.fork(there, folder / "log", folder / "stacks", rank=0)
    there.close()
    port = free_port()
    served = Served(process, here, port, folder / "log")
    command = ("serve", model, "--port", str(port), *_SMALL, *arguments)
    try:
        here.send((_command, (command, environment or {}, host), {}))
        if answers:
            served.wait_until_up()
        yield served
    except BaseException:
        print(f"--- {served.log}\n{served.log.read_text()[-20000:]}")
        raise
    finally:
        process.kill()
        here.close()

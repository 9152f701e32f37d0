"""Start ranks on this machine for the examples; in production your launcher does this."""

import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any


def run(function: Callable[..., Any], *args: Any, timeout: float, world: int = 2) -> list[Any]:
    """Call `function(*args)` on `world` gloo ranks of this machine; what each returned.

    If a rank raises, dies, or is not done after `timeout` seconds, all are killed and this
    process exits with status 1 and a sentence.
    """
    context = multiprocessing.get_context("spawn")
    port = _free_port()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # kill the ranks on the way out
    pipes: list[Connection] = []
    processes: list[BaseProcess] = []
    try:
        for rank in range(world):
            here, there = context.Pipe(duplex=False)
            arguments = (rank, world, port, timeout, there, function, args)
            process = context.Process(target=_rank_main, args=arguments, daemon=True)
            process.start()
            there.close()
            pipes.append(here)
            processes.append(process)
        return _collect(pipes, processes, timeout)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        for process in processes:
            process.join(3)
            process.kill()


def _collect(pipes: list[Connection], processes: list[BaseProcess], timeout: float) -> list[Any]:
    deadline = time.monotonic() + timeout
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            missing = ", ".join(str(r) for r in range(len(pipes)) if r not in results)
            for process in processes:
                process.kill()
            sys.exit(f"rank {missing} was not done after {timeout:g} s; all ranks were stopped.")
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = pipes.index(pipe)
            try:
                value, error = pipe.recv()
            except EOFError:
                processes[rank].join(3)
                value, error = None, f"it ended with status {processes[rank].exitcode}."
            if error is not None:
                for process in processes:
                    process.kill()
                sys.exit(f"rank {rank} failed, so all ranks were stopped: {error}")
            results[rank] = value
    return [results[rank] for rank in range(len(pipes))]


def _rank_main(
    rank: int,
    world: int,
    port: int,
    timeout: float,
    pipe: Connection,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    if rank > 0:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (one rank's progress is enough)
    loopback = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
    if loopback:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
    threads = max(1, _cores() // world)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # before torch starts its threads
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(threads))

    import torch
    import torch.distributed as dist

    torch.set_num_threads(threads)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"tcp://127.0.0.1:{port}",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=timeout),
        )
        value = function(*args)
        dist.barrier()
        pipe.send((value, None))
        dist.destroy_process_group()
    except BaseException:
        pipe.send((None, "\n" + traceback.format_exc()))
        raise SystemExit(1) from None


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])

"""What the benchmarks share: ranks pinned to cores, interleaved timing, statistics, reports."""

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import socket
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

Times = dict[str, list[float]]  # seconds per repetition, by variant


# ranks ------------------------------------------------------------------------------------------


def pin(rank: int) -> None:
    """Bind the calling thread, and threads that it starts from now on, to one core."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[rank % len(cores)]})


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _rank_main(
    rank: int, world: int, port: int, pinned: bool, pipe: Connection, job: tuple[Any, ...]
) -> None:
    function, *args = job
    try:
        if pinned:
            pin(rank)
        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo",
            init_method=f"tcp://127.0.0.1:{port}",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=300),
        )
        value = function(*args)
        dist.barrier()
        dist.destroy_process_group()
        pipe.send((value, None))
    except BaseException:
        pipe.send((None, traceback.format_exc()))
        raise


def run_ranks(
    world: int, function: Callable[..., Any], *args: Any, pinned: bool = True, limit: float = 1800
) -> list[Any]:
    """Call `function(*args)` on `world` gloo ranks of one thread each; the values by rank.

    pinned: bind rank r to the r-th core. The function and its arguments are pickled. Raises
    RuntimeError with the traceback of the first rank that fails, and TimeoutError after `limit`
    seconds; no process is left behind.
    """
    context = multiprocessing.get_context("spawn")
    port = free_port()
    pipes, processes = [], []
    for rank in range(world):
        here, there = context.Pipe()
        job = (function, *args)
        process = context.Process(
            target=_rank_main, args=(rank, world, port, pinned, there, job), daemon=True
        )
        process.start()
        there.close()
        pipes.append(here)
        processes.append(process)
    try:
        return _collect(pipes, limit)
    finally:
        for process in processes:
            process.join(10)
            if process.is_alive():
                process.kill()


def _collect(pipes: Sequence[Connection], limit: float) -> list[Any]:
    values: dict[int, Any] = {}
    deadline = time.monotonic() + limit
    while len(values) < len(pipes):
        pending = [pipe for rank, pipe in enumerate(pipes) if rank not in values]
        ready = wait(pending, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError(f"the ranks did not end within {limit:g} s")
        for pipe in ready:
            assert isinstance(pipe, Connection)
            value, error = pipe.recv()
            if error is not None:
                raise RuntimeError(f"rank {pipes.index(pipe)}:\n{error}")
            values[pipes.index(pipe)] = value
    return [values[rank] for rank in range(len(pipes))]


# timing -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def realtime(wanted: bool) -> Iterator[None]:
    """Run all threads of this process at real-time priority for a while, if wanted.

    On a machine that others use, a thread that wakes up otherwise waits for the slice of whoever
    holds its core, some milliseconds; one collective wakes several. Linux, and needs the right.
    """
    if not wanted:
        yield
        return
    _schedule(os.SCHED_FIFO, 1)
    try:
        yield
    finally:  # those that were started meanwhile, too
        _schedule(os.SCHED_OTHER, 0)


def _schedule(policy: int, priority: int) -> None:
    for path in Path("/proc/self/task").iterdir():
        with contextlib.suppress(ProcessLookupError):
            os.sched_setscheduler(int(path.name), policy, os.sched_param(priority))


def interleave(
    variants: Mapping[str, Callable[[], Any]],
    repetitions: int,
    warmup: int = 3,
    before: Callable[[], Any] = lambda: None,
    at_realtime: bool = False,
) -> Times:
    """Seconds of every variant, one after the other within each repetition.

    The order turns by one from repetition to repetition, so that no variant always follows the
    same one. before: runs, untimed, before each timed call (a barrier, a cache flush).
    at_realtime: see `realtime`; only around the timed calls, so that others get their turn.
    """
    times: Times = {name: [] for name in variants}
    names = list(variants)
    for repetition in range(-warmup, repetitions):
        turn = repetition % len(names)
        for name in names[turn:] + names[:turn]:
            with realtime(at_realtime):
                before()
                start = time.perf_counter()
                variants[name]()
                elapsed = time.perf_counter() - start
            if repetition >= 0:
                times[name].append(elapsed)
    return times


def slower_rank(per_rank: Sequence[Times]) -> Times:
    """Per repetition the time of the rank that took longest."""
    return {
        name: [max(together) for together in zip(*(times[name] for times in per_rank), strict=True)]
        for name in per_rank[0]
    }


def spread(values: Sequence[float], scale: float = 1e3) -> dict[str, float]:
    """Median, p10, p90, min and max; seconds become milliseconds by default."""
    ordered = sorted(v * scale for v in values)
    last = len(ordered) - 1
    return {
        "median": round(statistics.median(ordered), 4),
        "p10": round(ordered[round(0.1 * last)], 4),
        "p90": round(ordered[round(0.9 * last)], 4),
        "min": round(ordered[0], 4),
        "max": round(ordered[last], 4),
        "n": len(ordered),
    }


def ratio(a: Sequence[float], b: Sequence[float]) -> float:
    """Median of a over median of b."""
    return round(statistics.median(a) / statistics.median(b), 3)


def compared(
    per_rank: Sequence[Sequence[Mapping[str, Any]]], names: Sequence[str], pairs: Sequence[Any]
) -> tuple[list[str], list[list[Any]], list[dict[str, Any]]]:
    """A table, its columns first, and the same for a file: of the slower rank, by token count.

    per_rank: by rank and token count, "tokens", "times" and "errors" by variant. names: of the
    variants. pairs: of variants whose times are divided.
    """
    columns = ["tokens/rank", *names, *(f"{a}/{b}" for a, b in pairs)]
    rows, results = [], []
    for together in zip(*per_rank, strict=True):
        times = slower_rank([one["times"] for one in together])
        spreads = {name: spread(values) for name, values in times.items()}
        ratios = {f"{a}/{b}": ratio(times[a], times[b]) for a, b in pairs}
        rows.append([together[0]["tokens"], *(shown(spreads[n]) for n in names), *ratios.values()])
        errors = {n: max(one["errors"][n] for one in together) for n in together[0]["errors"]}
        results.append(
            {
                "tokens_per_rank": together[0]["tokens"],
                "milliseconds": spreads,
                "ratios": ratios,
                "logit_errors": errors,
            }
        )
    return columns, rows, results


def shown(values: Mapping[str, float], digits: int = 1) -> str:
    """'median [p10-p90]'."""
    return f"{values['median']:.{digits}f} [{values['p10']:.{digits}f}-{values['p90']:.{digits}f}]"


# reports ----------------------------------------------------------------------------------------


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--output", type=Path, help="write the results as JSON here")
    return made


def add_realtime(arguments: argparse.ArgumentParser) -> None:
    arguments.add_argument(
        "--realtime",
        action="store_true",
        help="time at real-time priority: for a machine that other processes use (Linux, root)",
    )


def integers(text: str) -> list[int]:
    """'1,2,4' -> [1, 2, 4]."""
    return [int(part) for part in text.split(",")]


def machine() -> dict[str, Any]:
    """The machine in general words, and the versions that matter."""
    return {
        "cpu": f"{os.cpu_count()}-core {platform.machine()}",
        "load_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def report(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    result: Mapping[str, Any],
    output: Path | None,
) -> None:
    """Print the table and the JSON, and write the JSON to `output`."""
    table = Table(title=title)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row))
    Console(width=Console(width=1000).measure(table).maximum).print(table)
    text = json.dumps(result, indent=2)
    print(text)
    if output is not None:
        output.write_text(text + "\n")

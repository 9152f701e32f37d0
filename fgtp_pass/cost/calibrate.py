"""Measures the constants of the formulas on this machine: matmuls and collectives in real ranks.

Everything is timed as a dependent chain: each call takes what the one before gave, so that nothing
overlaps, and each matmul has a weight of its own, so that none is read from a cache. Chains are
warmed up and repeated; constants come from medians, and their spread is recorded.
"""

import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from fgtp_pass import collectives, packing
from fgtp_pass.algebra import Collective, sent_bytes
from fgtp_pass.collectives import ComponentGroup, DataParallelGroup
from fgtp_pass.cost.hardware import Calibration, CollectiveTime, Constant, Hardware, Link, Overlap
from fgtp_pass.plan import itemsize
from fgtp_pass.sizes import divisors

_WIDTH = 2048  # a weight is [2048, 2048]: 16 MiB in fp32, more than a core's share of a cache
_WEIGHTS = 6
_ROWS = (1, 2, 4, 8, 16, 32, 64)
_ACCELERATOR_ROWS = (*_ROWS, 256, 1024, 4096)
_TOKENS = (4, 32, 128)  # rows of [n, 2048] that the collectives move
_REPETITIONS = 15
_WARMUP = 3


def measure(
    group: DataParallelGroup,
    device: torch.device,
    dtypes: Sequence[torch.dtype],
) -> Hardware:
    """A profile of the devices and links of a data-parallel group. Collective; takes seconds.

    Ranks measure at the same time, since those of a node share memory and links; a time is that of
    the slowest rank. Matmuls are those that shards run as. dtypes: to measure a matmul rate for;
    all else is measured with the first. All ranks get the same profile.
    """
    rows = _ROWS if device.type == "cpu" else _ACCELERATOR_ROWS
    with torch.no_grad():
        matmuls = {
            (str(dtype).removeprefix("torch."), n): _matmul_chain(group, weights, n)
            for dtype in dtypes
            for weights in [_weights(device, dtype)]
            for n in rows
        }
        weights = _weights(device, dtypes[0])
        sizes = [k for k in divisors(group.size) if k > 1]
        moves = {
            (kind, k, n): _collective_chain(group, kind, k, n, weights)
            for k in sizes
            for kind in Collective
            for n in _TOKENS
        }
    return _profile(device, sizes, matmuls, moves)


def _weights(device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    weights = [_random(_WIDTH, _WIDTH, device=device, dtype=dtype) for _ in range(_WEIGHTS)]
    for weight in weights:
        if packing.supports(weight):
            packing.pack(weight)
    return weights


def _linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    if weight.device.type != "cpu":
        return F.linear(x, weight)
    out: torch.Tensor = torch.ops.fgtp_pass.linear(x, weight, None)
    return out


def _random(*shape: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Values that keep their size through a chain of matmuls."""
    return (torch.randn(*shape, device=device) / math.sqrt(shape[-1])).to(dtype)


def _matmul_chain(
    group: DataParallelGroup, weights: Sequence[torch.Tensor], rows: int
) -> list[float]:
    """Seconds of one matmul with `rows` rows, by repetition."""
    first = _random(rows, _WIDTH, device=weights[0].device, dtype=weights[0].dtype)

    def chain() -> None:
        x = first
        for weight in weights:
            x = _linear(x, weight)

    return [seconds / len(weights) for seconds in _times(group, chain)]


def _collective_chain(
    group: DataParallelGroup,
    kind: Collective,
    size: int,
    tokens: int,
    weights: Sequence[torch.Tensor],
) -> list[float]:
    """Seconds that one collective adds to a chain of matmuls, by repetition.

    A matmul before each, as in a model: caches are cold, and ranks arrive as they do in a step.
    """
    members = group.component_group(size)
    data = _random(size * tokens, _WIDTH, device=weights[0].device, dtype=weights[0].dtype)
    x = _random(1, _WIDTH, device=weights[0].device, dtype=weights[0].dtype)

    def chain(moving: bool) -> None:
        row, moved = x, data
        for weight in weights:
            row = _linear(row, weight)
            if moving:
                moved[:1] = row
                moved = _move(members, kind, moved, tokens)

    alone = statistics.median(_times(group, lambda: chain(False)))
    together = _times(group, lambda: chain(True))
    return [max(0.0, (seconds - alone) / len(weights)) for seconds in together]


def _move(
    group: ComponentGroup, kind: Collective, everyones: torch.Tensor, tokens: int
) -> torch.Tensor:
    """[k * tokens, width] -> [k * tokens, width] by way of the collective."""

    def run(target: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return target(*args, **kwargs)

    moved: torch.Tensor
    if kind is Collective.ALL_GATHER:
        moved = collectives.all_gather(run, group, everyones[:tokens])
    elif kind is Collective.ALL_TO_ALL:
        moved = collectives.all_to_all(run, group, everyones, tokens)
    else:
        own = collectives.reduce_scatter(run, group, everyones, tokens, _WIDTH)
        moved = everyones
        moved[:tokens] = own / group.size
    return moved


def _times(group: DataParallelGroup, chain: Callable[[], None]) -> list[float]:
    """Seconds of the slowest rank, by repetition."""
    seconds = []
    for _ in range(_WARMUP + _REPETITIONS):
        _synchronize()
        dist.barrier(group.control_group(group.size))
        start = time.perf_counter()
        chain()
        _synchronize()
        seconds.append(time.perf_counter() - start)
    slowest = torch.tensor(seconds[_WARMUP:], dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX, group=group.control_group(group.size))
    return [float(value) for value in slowest]


def _synchronize() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


# constants --------------------------------------------------------------------------------------


def _profile(
    device: torch.device,
    sizes: Sequence[int],
    matmuls: Mapping[tuple[str, int], list[float]],
    moves: Mapping[tuple[Collective, int, int], list[float]],
) -> Hardware:
    at = datetime.now(UTC).isoformat(timespec="seconds")
    source = f"measured at {at}"
    dtypes = list(dict.fromkeys(dtype for dtype, _ in matmuls))
    fitted = {
        dtype: fit_roofline(
            {n: statistics.median(times) for (one, n), times in matmuls.items() if one == dtype}
        )
        for dtype in dtypes
    }
    reading, _, overlap = fitted[dtypes[0]]
    row_bytes = _WIDTH * itemsize(dtypes[0])
    times = {kind: _fit_collective(kind, moves, sizes, row_bytes, source) for kind in Collective}
    link = Link(kind="measured", **{kind.value: time for kind, time in times.items()})
    spread = {f"{dtype} matmul of {n} rows": _spread(v) for (dtype, n), v in matmuls.items()}
    spread |= {
        f"{kind.value} of {rows} rows over {k}": _spread(values)
        for (kind, k, rows), values in moves.items()
    }
    whole = Constant(value=1.0, source="measured constants need no correction")
    rates = {
        dtype: Constant(value=2 * _WIDTH * _WIDTH / computing, source=source)
        for dtype, (_, computing, _) in fitted.items()
    }
    return Hardware(
        name="calibrated",
        title=f"this machine ({_device_name(device)})",
        memory=Constant(value=_memory(device), source="as the system reports it, per rank"),
        memory_bandwidth=Constant(value=_WIDTH * row_bytes / reading, source=source),
        memory_efficiency=whole,
        matmul_rates=rates,
        matmul_efficiency=whole,
        overlap=Overlap(value=overlap, source=source),
        within_node=link,
        across_nodes=link,
        calibration=Calibration(
            measured_at=at,
            machine=_device_name(device),
            torch=torch.__version__,
            world=tuple(sizes),
            spread=spread,
        ),
    )


def fit_roofline(seconds: Mapping[int, float]) -> tuple[float, float, float]:
    """(seconds to read a weight, seconds to compute one row, overlap) from times by rows.

    Least squares in relative error of max(m, c * rows) + (1 - overlap) * min(m, c * rows): linear
    in m and c once it is known from which row count on computing is longer, so every such count
    and every overlap in steps of 0.05 is tried.
    """
    rows = sorted(seconds)
    wanted = torch.tensor([seconds[n] for n in rows], dtype=torch.float64)
    best: tuple[float, float, float, float] | None = None
    for step in range(21):
        hidden = 1 - step / 20
        for split in range(len(rows) + 1):
            matrix = torch.tensor(
                [(1.0, hidden * n) if i < split else (hidden, n) for i, n in enumerate(rows)],
                dtype=torch.float64,
            )
            solved = torch.linalg.lstsq(
                matrix / wanted[:, None], torch.ones_like(wanted)[:, None], driver="gelsd"
            ).solution[:, 0]
            m, c = float(solved[0]), float(solved[1])
            if m <= 0 or c <= 0:
                continue
            error = sum(
                (max(m, c * n) + hidden * min(m, c * n) - t) ** 2 / t**2
                for n, t in zip(rows, wanted.tolist(), strict=True)
            )
            if best is None or error < best[0]:
                best = (error, m, c, step / 20)
    assert best is not None, "some split fits times that are positive"
    return best[1:]


def _fit_collective(
    kind: Collective,
    moves: Mapping[tuple[Collective, int, int], list[float]],
    sizes: Sequence[int],
    row_bytes: int,
    source: str,
) -> CollectiveTime:
    """base + peer * (k - 1) + sent / bandwidth by least squares; no peer term for one size."""
    mine = [(k, n, statistics.median(v)) for (one, k, n), v in moves.items() if one is kind]
    sent = [float(n * sent_bytes(kind, row_bytes, k)) for k, n, _ in mine]
    columns = [[1.0] * len(mine), sent]
    if len(sizes) > 1:
        columns.append([float(k - 1) for k, _, _ in mine])
    seconds = torch.tensor([t for _, _, t in mine], dtype=torch.float64)
    matrix = torch.tensor(columns, dtype=torch.float64).T
    scale = matrix.abs().amax(0)
    solved = (torch.linalg.lstsq(matrix / scale, seconds[:, None]).solution[:, 0] / scale).tolist()
    # a slope that noise made negative: no slower than the largest message was as a whole
    slowest = max(s / t for s, (_, _, t) in zip(sent, mine, strict=True) if t > 0)
    per_byte = solved[1] if solved[1] > 0 else 1 / slowest
    return CollectiveTime(
        base_seconds=max(0.0, solved[0]),
        seconds_per_peer=max(0.0, solved[2]) if len(solved) > 2 else 0.0,
        bytes_per_second=1 / per_byte,
        source=source,
    )


def _spread(values: Sequence[float]) -> float:
    """(p90 - p10) / median."""
    ordered = sorted(values)
    last = len(ordered) - 1
    median = statistics.median(ordered)
    width = ordered[round(0.9 * last)] - ordered[round(0.1 * last)]
    return round(width / median, 3) if median else 0.0


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} threads, {platform.machine()}"


def _memory(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    ranks = dist.get_world_size()
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) / ranks

"""Constants of the formulas, fitted to measured times."""

import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

import torch
import torch.distributed as dist

from fgtp_pass.algebra.path import sent_bytes
from fgtp_pass.algebra.placement import Collective
from fgtp_pass.cost.hardware import Calibration, CollectiveTime, Constant, Hardware, Link, Overlap
from fgtp_pass.plan.plan import itemsize

# What is measured: matmuls with weights [2048, 2048], collectives on rows of 2048. A weight has
# 16 MiB in fp32, more than a core's share of a cache.
WIDTH = 2048


def fit_profile(
    device: torch.device,
    sizes: Sequence[int],
    matmuls: Mapping[tuple[str, int], list[float]],
    moves: Mapping[tuple[Collective, int, int], list[float]],
) -> Hardware:
    """The profile of a device. matmuls: seconds by dtype and rows; moves: by collective, group size
    and rows.
    """
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
    row_bytes = WIDTH * itemsize(dtypes[0])
    times = {
        kind.value: _fit_collective(kind, moves, sizes, row_bytes, source) for kind in Collective
    }
    link = Link.model_validate({"kind": "measured", **times})
    spread = {f"{dtype} matmul of {n} rows": _spread(v) for (dtype, n), v in matmuls.items()}
    spread |= {
        f"{kind.value} of {rows} rows over {k}": _spread(values)
        for (kind, k, rows), values in moves.items()
    }
    whole = Constant(value=1.0, source="measured constants need no correction")
    rates = {
        dtype: Constant(value=2 * WIDTH * WIDTH / computing, source=source)
        for dtype, (_, computing, _) in fitted.items()
    }
    return Hardware(
        name="calibrated",
        title=f"this machine ({_device_name(device)})",
        memory=Constant(value=_memory(device), source="as the system reports it, per rank"),
        memory_bandwidth=Constant(value=WIDTH * row_bytes / reading, source=source),
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

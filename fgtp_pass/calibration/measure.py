"""Measures the constants of the formulas on this machine: matmuls and collectives in real ranks.

Everything is timed as a dependent chain: each call takes what the one before gave, so that nothing
overlaps, and each matmul has a weight of its own, so that none is read from a cache. Chains are
warmed up and repeated; constants come from medians, and their spread is recorded.
"""

import logging
import math
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import cycle, islice
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from fgtp_pass.algebra.placement import Collective
from fgtp_pass.calibration.fit import WIDTH, fit_profile
from fgtp_pass.collectives import functional
from fgtp_pass.collectives.groups import ComponentGroup, DataParallelGroup
from fgtp_pass.cost.hardware import Hardware
from fgtp_pass.plan.sizes import divisors
from fgtp_pass.weights import packing

log = logging.getLogger("fgtp_pass")

_WEIGHTS = 6


# Matmuls of [2048, 2048] between two collectives. A layer of a dense decoder has some 12 to 16
# weights of hidden x hidden for its three or four messages, and the more work stands between two
# messages, the further apart ranks arrive.
_MATMULS_BETWEEN = 4


_MESSAGES = 3  # of a chain


_ROWS = (1, 2, 4, 8, 16, 32, 64)


_ACCELERATOR_ROWS = (*_ROWS, 256, 1024, 4096)


_TOKENS = (4, 32, 128)  # rows of [n, 2048] that the collectives move


_REPETITIONS = 15


_WARMUP = 3


_TRIES = 3


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
    return fit_profile(device, sizes, matmuls, moves)


def _weights(device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    weights = [_random(WIDTH, WIDTH, device=device, dtype=dtype) for _ in range(_WEIGHTS)]
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
    first = _random(rows, WIDTH, device=weights[0].device, dtype=weights[0].dtype)

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

    Matmuls before each, as in a model: caches are cold, and ranks arrive as they do in a step.
    Where other work on the machine hides what it adds, again and again, those of a chain of the
    collective alone stand for it.
    """
    members = group.component_group(size)
    data = _random(size * tokens, WIDTH, device=weights[0].device, dtype=weights[0].dtype)
    x = _random(1, WIDTH, device=weights[0].device, dtype=weights[0].dtype)

    def chain(multiplying: bool, moving: bool) -> None:
        row, moved, each = x, data, cycle(weights)
        for _ in range(_MESSAGES):
            for weight in islice(each, _MATMULS_BETWEEN if multiplying else 0):
                row = _linear(row, weight)
            if moving:
                moved[:1] = row
                moved = _move(members, kind, moved, tokens)

    for _ in range(_TRIES):
        alone = statistics.median(_times(group, lambda: chain(True, False)))
        together = _times(group, lambda: chain(True, True))
        added = [max(0.0, (seconds - alone) / _MESSAGES) for seconds in together]
        if statistics.median(added) > 0:
            return added
    if group.rank == 0:
        log.warning(
            "calibration: the machine is too busy to see what an %s of %d rows over %d ranks adds "
            "to matmuls, %d times in a row; its time without them is taken. Measure again when the "
            "machine is idle.",
            *(kind.value, tokens, size, _TRIES),
        )
    return [s / _MESSAGES for s in _times(group, lambda: chain(False, True))]


def _move(
    group: ComponentGroup, kind: Collective, everyones: torch.Tensor, tokens: int
) -> torch.Tensor:
    """[k * tokens, width] -> [k * tokens, width] by way of the collective."""

    def run(target: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return target(*args, **kwargs)

    moved: torch.Tensor
    if kind is Collective.ALL_GATHER:
        moved = functional.all_gather(run, group, everyones[:tokens])
    elif kind is Collective.ALL_TO_ALL:
        moved = functional.all_to_all(run, group, everyones, tokens)
    elif kind is Collective.ALL_REDUCE:
        moved = functional.all_reduce(run, group, everyones, *everyones.shape) / group.size
    else:
        own = functional.reduce_scatter(run, group, everyones, tokens, WIDTH)
        moved = everyones
        moved[:tokens] = own / group.size
    return moved


def _times(group: DataParallelGroup, chain: Callable[[], None]) -> list[float]:
    """Seconds of the slowest rank, by repetition."""
    seconds = []
    for _ in range(_WARMUP + _REPETITIONS):
        _synchronize()
        dist.barrier(group.gloo_group(group.size))
        start = time.perf_counter()
        chain()
        _synchronize()
        seconds.append(time.perf_counter() - start)
    slowest = torch.tensor(seconds[_WARMUP:], dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX, group=group.gloo_group(group.size))
    return [float(value) for value in slowest]


def _synchronize() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()

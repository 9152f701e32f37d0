"""`fgtp calibrate`: real ranks on this machine, one device or an equal share of the cores each."""

import os
import tempfile
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing

from fgtp_pass.calibration.measure import measure
from fgtp_pass.collectives.groups import data_parallel_group
from fgtp_pass.cost.hardware import Hardware
from fgtp_pass.errors import ConfigError

_TIMEOUT = timedelta(seconds=300)


def calibrate(world: int, dtypes: Sequence[str]) -> Hardware:
    """Measure with `world` ranks: CUDA and NCCL where there are that many devices, else gloo.

    Raises ConfigError for a dtype that torch does not know.
    """
    for dtype in dtypes:
        if not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ConfigError(f"torch has no dtype {dtype!r}")
    spawn: Any = multiprocessing.spawn  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory() as folder:
        spawn(_rank_main, args=(world, dtypes, folder), nprocs=world)
        return Hardware.model_validate_json((Path(folder) / "profile.json").read_text())


def _rank_main(rank: int, world: int, dtypes: Sequence[str], folder: str) -> None:
    accelerated = torch.cuda.is_available() and torch.cuda.device_count() >= world
    if accelerated:
        torch.cuda.set_device(rank)
    else:
        _take_cores(rank, world)
    dist.init_process_group(
        "nccl" if accelerated else "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        timeout=_TIMEOUT,
    )
    device = torch.device("cuda", rank) if accelerated else torch.device("cpu")
    group = data_parallel_group(None, _TIMEOUT)
    profile = measure(group, device, [getattr(torch, dtype) for dtype in dtypes])
    if rank == 0:
        (Path(folder) / "profile.json").write_text(profile.model_dump_json())
    dist.barrier()
    dist.destroy_process_group()


def _take_cores(rank: int, world: int) -> None:
    """Bind the rank, and the threads that it starts from now on, to its share of the cores."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    share = max(1, len(cores) // world)
    torch.set_num_threads(share)
    if cores:
        start = rank * share % len(cores)
        os.sched_setaffinity(0, cores[start : start + share])

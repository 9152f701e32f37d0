"""Memory, bytes and rate of reading a model in shards, on 2 and 4 ranks.

A Llama-like fp32 checkpoint of some 0.2 billion random parameters is written by transformers; 2
and 4 gloo ranks read it with `load_checkpoint` (eager inner backend). Each rank loads a toy model
first, so that what a process imports once is resident before.

    model      bytes of the whole model
    keeps      bytes of what this rank holds of it afterwards
    read       bytes that it read of the checkpoint, over what it keeps; at most 1.05 is right
    resident   resident set after loading above the one before
    peak       largest resident set while loading, above the one before and what it keeps; at most
               one slice is right: the largest part of a weight that the rank keeps
    rate       bytes per second while reading, with files that are not in the page cache, over that
               of plain sequential reads into one buffer of 16 MiB, of as many bytes and in as many
               processes; at least 0.8 is right. The two take turns; medians

`--saved` reads shards that `save_checkpoint` wrote, and compares their checksums on the way.
"""

import math
import os
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from common import integers, machine, parser, report, run_ranks
from memory import SHAPE, TOY, PeakWatch, resident
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import fgtp_pass
from fgtp_pass.backend import runtime
from fgtp_pass.checkpoint import load
from fgtp_pass.weights import shard

MIB = 2**20
BUFFER = 16 * MIB


def write(shape: dict[str, int], folder: str) -> None:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**shape, dtype=torch.float32)).save_pretrained(folder)


def forget_pages(folder: str) -> None:
    """Drop the files' pages from the page cache, as a file of another machine would be."""
    for path in Path(folder).glob("*.safetensors"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_plainly(folder: str, start: int, length: int) -> float:
    """Seconds to read that many bytes of the files, one after the other, as if they were one."""
    buffer = memoryview(bytearray(BUFFER))
    began = time.perf_counter()
    for path in sorted(Path(folder).glob("*.safetensors")):
        size = path.stat().st_size
        with open(path, "rb", buffering=0) as file:
            at = min(start, size)
            file.seek(at)
            start -= at
            while length > 0 and at < size:
                got = file.readinto(buffer[: min(BUFFER, length, size - at)])
                at, length = at + got, length - got
    return time.perf_counter() - began


def empty(shape: dict[str, int]) -> Any:
    with fgtp_pass.init_empty_weights():
        model = AutoModelForCausalLM.from_config(LlamaConfig(**shape), dtype=torch.float32)
    return model.eval().requires_grad_(False)


def read_in_shards(shape: dict[str, int], folder: str, world: int) -> dict[str, Any]:
    """Load once; bytes, resident set and the seconds in which weights were read."""
    sizes = {f"{c}_tensor_parallel_size": world for c in ("embedding", "lmhead", "oproj", "mlp")}
    seconds, checkpoints = [0.0], []
    real_open, real_shard = load.open_checkpoint, runtime.shard_parameters

    def opened(path: Path) -> Any:
        checkpoints.append(real_open(path))
        return checkpoints[0]

    def timed(*arguments: Any) -> int:
        began = time.perf_counter()
        count = real_shard(*arguments)
        seconds[0] += time.perf_counter() - began
        return count

    before = resident()
    with (
        mock.patch.object(load, "open_checkpoint", opened),
        mock.patch.object(runtime, "shard_parameters", timed),
        mock.patch.object(shard, "shard_parameters", timed),
        PeakWatch() as watch,
    ):
        model = fgtp_pass.load_checkpoint(
            empty(shape),
            folder,
            kwargs={"input_ids": torch.ones(4, 1, dtype=torch.long), "use_cache": False},
            options={"finegrained_tp_config": sizes, "inner_backend": "eager"},
        )
    after = resident()
    parts = fgtp_pass.shard_state_dict(model)  # of packed shards copies
    keeps = {name: part.nbytes for name, part in parts.items()}
    return {
        "model": sum(math.prod(p.shape) * p.dtype.itemsize for p in model.parameters()),
        "keeps": sum(keeps.values()),
        "largest": max(keeps.values()),
        "read": checkpoints[0].count.bytes,
        "seconds": seconds[0],
        "resident": after - before,
        "peak": watch.peak - before,
    }


def rank_main(world: int, folder: str, toy: str, repetitions: int) -> dict[str, Any]:
    warnings.filterwarnings("ignore")
    read_in_shards(TOY, toy, world)
    loads, plain = [], []
    for _ in range(repetitions):
        _together(folder)
        loads.append(read_in_shards(SHAPE, folder, world))
        _together(folder)
        length = loads[-1]["read"]
        # as many bytes, and together all of the files
        last = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors")) - length
        start = dist.get_rank() * last // (dist.get_world_size() - 1)
        plain.append(read_plainly(folder, start, length))
    median = statistics.median(one["seconds"] for one in loads)
    last = loads[0] | {"seconds": median, "plain_seconds": statistics.median(plain)}
    return last | {"all_seconds": [one["seconds"] for one in loads], "all_plain": plain}


def _together(folder: str) -> None:
    dist.barrier()
    forget_pages(folder)
    dist.barrier()


def save_shards(world: int, folder: str, shape: dict[str, int], to: str) -> None:
    sizes = {f"{c}_tensor_parallel_size": world for c in ("embedding", "lmhead", "oproj", "mlp")}
    model = fgtp_pass.load_checkpoint(
        empty(shape),
        folder,
        kwargs={"input_ids": torch.ones(4, 1, dtype=torch.long), "use_cache": False},
        options={"finegrained_tp_config": sizes, "inner_backend": "eager"},
    )
    fgtp_pass.save_checkpoint(model, to)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--worlds", type=integers, default=[2, 4], help="numbers of ranks")
    arguments.add_argument("--repetitions", type=int, default=5)
    arguments.add_argument("--saved", action="store_true", help="read saved shards")
    arguments.add_argument("--folder", type=Path, help="where to write the checkpoint")
    given = arguments.parse_args()
    at = machine()
    rows, results = [], []
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        toy, whole = f"{folder}/toy", f"{folder}/whole"
        write(TOY, toy)
        write(SHAPE, whole)
        for world in given.worlds:
            path = whole
            if given.saved:
                path = f"{folder}/{world}"
                run_ranks(world, save_shards, world, whole, SHAPE, path, pinned=False)
            of = run_ranks(world, rank_main, world, path, toy, given.repetitions, pinned=False)
            for rank, one in enumerate(of):
                rate = one["read"] / one["seconds"]
                rows.append(
                    [
                        f"{rank} of {world}",
                        *(f"{one[k] / MIB:.0f}" for k in ("model", "keeps", "read")),
                        f"{one['read'] / one['keeps']:.3f}",
                        f"{one['resident'] / MIB:.0f}",
                        f"{(one['peak'] - one['keeps']) / MIB:+.0f}",
                        f"{one['largest'] / MIB:.0f}",
                        f"{rate / MIB:.0f}",
                        f"{one['plain_seconds'] / one['seconds']:.2f}",
                    ]
                )
                results.append({"world": world, "rank": rank, **one})
    report(
        "Reading a model in shards, per rank, in MiB and MiB/s",
        ["rank", "model", "keeps", "read", "read/keeps", "resident", "peak above", "largest slice",
         "rate", "of plain reads"],
        rows,
        {"benchmark": "loading", "machine": at, "model": SHAPE, "results": results},
        given.output,
    )  # fmt: skip


if __name__ == "__main__":
    main()

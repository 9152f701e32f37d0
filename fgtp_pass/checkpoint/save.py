"""`save_checkpoint`: each rank writes its own part, or all together a normal checkpoint."""

import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from fgtp_pass.agreement.control_group import all_ranks, reporting_failure
from fgtp_pass.agreement.meeting import Meeting
from fgtp_pass.backend.backend import data_parallel_of
from fgtp_pass.checkpoint import hugging_face
from fgtp_pass.checkpoint.exchange import exchange
from fgtp_pass.checkpoint.files import SUFFIX, save_of
from fgtp_pass.checkpoint.names import tensor_names
from fgtp_pass.checkpoint.shard_files import PARTIAL, own_parts, write_parts
from fgtp_pass.checkpoint.shard_index import INDEX_NAME, File, ShardIndex, Tensor, read_index
from fgtp_pass.checkpoint.whole_files import write_whole
from fgtp_pass.errors import CheckpointError
from fgtp_pass.weights.state import applied_plan, original_module
from fgtp_pass.weights.unread_parameter import source_of


def save_checkpoint(
    model: nn.Module, path: str | Path, *, merge: bool = False, process_group: Any = None
) -> None:
    """Save each rank's shards with one index, or with `merge` a normal checkpoint of whole tensors.

    Shards are safetensors in the layout that torch's distributed checkpoint reads, and
    `fgtp_shards.json` holds the plan, sizes and checksums. path: a folder, made if need be, that
    all ranks share, or that each host has on a disk of its own. Merged, rank 0 writes what
    `save_pretrained` would, one file after the other; no rank holds more than one whole file.

    process_group: the data-parallel group, as in the backend's options. Collective. What was saved
    there before is replaced; a save that does not come to its end is not taken for a checkpoint.
    """
    model = original_module(model)
    group = data_parallel_of({"process_group": process_group})
    control = all_ranks(group) if group is not None else None
    rank = group.rank if group is not None else 0
    folder = Path(path)
    with reporting_failure(control):
        unread = [source.name for p in model.parameters() if (source := source_of(p)) is not None]
        if unread:
            raise CheckpointError(f"{unread[0]} has not been read, so there is nothing to save.")
        if not merge or rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            _check_free(folder, merge)
    if merge:
        write_whole(model, folder, group)
        if rank == 0:
            hugging_face.save_config(model, folder)
    else:
        _save_shards(model, folder, control, rank)


def _save_shards(model: nn.Module, folder: Path, control: Meeting | None, rank: int) -> None:
    save = exchange(control, secrets.token_hex(8))[0]
    with reporting_failure(control):
        host = _ranks_here(folder, control, rank, save)
    try:
        with reporting_failure(control):
            parts = own_parts(model, rank, host)
            written = write_parts(folder, parts, rank, host[0], save)
        files = [file for one in exchange(control, written) for file in one.items()]
        index = _index(model, dict(files), control)
        with reporting_failure(control):
            if rank == host[0]:
                _remove_old(folder)
        exchange(control, "nothing old is left")
        with reporting_failure(control):
            for name in written:
                os.replace(folder / (name + PARTIAL), folder / name)
        exchange(control, "all files are there")
        with reporting_failure(control):
            if rank == host[0]:
                _write_index(model, folder, index)
        exchange(control, "saved")
    finally:
        for left in folder.glob(f"shard-{rank + 1:05}-*{PARTIAL}"):
            left.unlink()


def _ranks_here(folder: Path, control: Meeting | None, rank: int, save: str) -> Sequence[int]:
    """The ranks to which `folder` is the same folder, in order, this one included."""
    token = folder / f".{save}-{rank}"
    token.touch()
    try:
        exchange(control, "here")
        here = sorted(int(t.name.rpartition("-")[2]) for t in folder.glob(f".{save}-*"))
        exchange(control, here)
    finally:
        token.unlink()
    return here


def _check_free(folder: Path, merge: bool) -> None:
    """Raise CheckpointError if there are files of another kind than those to be saved."""
    index = read_index(folder)
    for file in sorted(folder.glob(f"*{SUFFIX}")):
        of_shards = (index is not None and file.name in index.files) or save_of(file) is not None
        if of_shards is merge:
            raise CheckpointError(
                f"{file} is of another checkpoint. Save to a folder of its own, or remove it."
            )


def _remove_old(folder: Path) -> None:
    """Remove an earlier save: its index first, so that its files are not taken for whole."""
    (folder / INDEX_NAME).unlink(missing_ok=True)
    for file in folder.glob(f"*{SUFFIX}"):
        file.unlink()


def _index(model: nn.Module, files: dict[str, File], control: Meeting | None) -> ShardIndex:
    tensors = {
        names[0]: Tensor(
            shape=tuple(value.shape),
            dtype=str(value.dtype).removeprefix("torch."),
            tied=tuple(names[1:]),
        )
        for value, names in tensor_names(model).items()
    }
    size = control.size if control is not None else 1
    plan = applied_plan(model)
    return ShardIndex(data_parallel_size=size, plan=plan, tensors=tensors, files=files)


def _write_index(model: nn.Module, folder: Path, index: ShardIndex) -> None:
    hugging_face.save_config(model, folder)
    unfinished = folder / (INDEX_NAME + PARTIAL)
    with open(unfinished, "w") as file:
        file.write(index.model_dump_json(indent=1))
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, folder / INDEX_NAME)

"""A normal checkpoint of a sharded model: whole tensors, put together one file after the other."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from fgtp_pass.agreement.control_group import all_ranks, reporting_failure
from fgtp_pass.agreement.message import Intent
from fgtp_pass.checkpoint import hugging_face
from fgtp_pass.checkpoint.files import SUFFIX
from fgtp_pass.checkpoint.lazy_tensor import read, stored_tensor
from fgtp_pass.checkpoint.names import tensor_names
from fgtp_pass.checkpoint.shard_files import FILE_BYTES, PARTIAL
from fgtp_pass.collectives.groups import DataParallelGroup
from fgtp_pass.weights.shard import gather_full
from fgtp_pass.weights.sharded_parameter import record_of


@dataclass(frozen=True)
class _HeldTensor:
    """A tensor of the model as something to read, on the rank that writes.

    Where it is sharded, reading is collective over the component group of the writer, which is a
    global rank. The other ranks leave `out` as it is.
    """

    name: str
    value: torch.Tensor
    writer: int
    is_writer: bool

    def read_into(
        self, out: torch.Tensor, shape: Sequence[int], stride: Sequence[int], offset: int
    ) -> None:
        record = record_of(self.value)
        if record is not None and self.writer in record.group.ranks:
            whole = gather_full(record)
        elif self.is_writer:
            whole = self.value.detach().contiguous()
        if self.is_writer:
            out.copy_(whole.as_strided(shape, stride, whole.storage_offset() + offset))


def write_whole(model: nn.Module, folder: Path, group: DataParallelGroup | None) -> None:
    """Write a checkpoint as transformers does: files, an index where there are several.

    Under the names of the model's checkpoints (see `hugging_face.to_checkpoint`), a tied weight
    once. Collective.
    """
    control = all_ranks(group) if group is not None else None
    writer = group.ranks[0] if group is not None else 0
    rank = group.rank if group is not None else 0
    tensors = {
        names[0]: stored_tensor(
            _HeldTensor(names[0], value, writer, rank == 0), value.shape, value.dtype
        )
        for value, names in tensor_names(model).items()
    }
    if hugging_face.is_pretrained_model(model):
        tensors = hugging_face.to_checkpoint(model, tensors)
    files = _in_files(tensors)
    written: list[str] = []
    for number, names in enumerate(files, 1):
        # all wait for the file before, so that none sends to a rank that could not write it
        if control is not None:
            control.exchange(Intent.LOAD)
        chosen: dict[str, torch.Tensor] = {}
        for name in names:
            tensor = read(tensors[name])
            if rank == 0:
                chosen[name] = tensor
        with reporting_failure(control):
            if rank == 0:
                only = len(files) == 1
                file = f"model{'' if only else f'-{number:05}-of-{len(files):05}'}{SUFFIX}"
                save_file(chosen, folder / (file + PARTIAL), metadata={"format": "pt"})
                written.append(file)
    with reporting_failure(control):
        if rank == 0:
            _finish(folder, dict(zip(written, files, strict=True)), tensors)
    if control is not None:
        control.exchange(Intent.LOAD)


def _in_files(tensors: Mapping[str, torch.Tensor]) -> list[list[str]]:
    """The names, spread over files of at most FILE_BYTES, or of one tensor that is larger."""
    files: list[list[str]] = []
    free = 0
    for name, tensor in tensors.items():
        if tensor.nbytes > free or not files:
            files.append([])
            free = FILE_BYTES
        files[-1].append(name)
        free -= tensor.nbytes
    return files


def _finish(
    folder: Path, files: Mapping[str, Sequence[str]], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Put the files into the place of those of an earlier save."""
    index = folder / f"model{SUFFIX}.index.json"
    for old in [index, *folder.glob(f"*{SUFFIX}")]:
        old.unlink(missing_ok=True)
    for file in files:
        os.replace(folder / (file + PARTIAL), folder / file)
    if len(files) > 1:
        weight_map = {name: file for file, names in files.items() for name in names}
        total = sum(tensor.nbytes for tensor in tensors.values())
        content = {"metadata": {"total_size": total}, "weight_map": weight_map}
        index.write_text(json.dumps(content, indent=2) + "\n")

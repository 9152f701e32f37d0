"""The files of saved shards: which rank writes which part, and how.

A part is what a rank keeps of a tensor, without its padding: a stretch of each block that is cut,
or a whole tensor. Of the ranks that hold the same part one writes it.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from fgtp_pass.checkpoint.files import OFFSETS_KEY, PARTS_KEY, SAVE_KEY
from fgtp_pass.checkpoint.names import tensor_names
from fgtp_pass.checkpoint.shard_index import File, Part
from fgtp_pass.weights import packing
from fgtp_pass.weights.checksum import checksum
from fgtp_pass.weights.cut import Piece, pieces
from fgtp_pass.weights.sharded_parameter import record_of

FILE_BYTES = 2**30  # in one file, whose tensors are copied at once
PARTIAL = ".partial"  # behind the name of a file that is not finished


@dataclass(frozen=True)
class OwnPart:
    """A part that this rank holds. piece: the stretch of dim that it is, None for all."""

    name: str
    value: torch.Tensor
    dim: int = 0
    piece: Piece | None = None

    @property
    def offsets(self) -> tuple[int, ...]:
        start = self.piece.start if self.piece is not None else 0
        return tuple(start if d == self.dim else 0 for d in range(self.value.dim()))

    @property
    def nbytes(self) -> int:
        whole = self.value.numel() * self.value.dtype.itemsize
        if self.piece is None:
            return whole
        return whole // self.value.shape[self.dim] * self.piece.length

    def tensor(self) -> torch.Tensor:
        """Its data, contiguous, on the CPU."""
        record = record_of(self.value)
        held = self.value.detach() if record is None else packing.plain(record.shard)
        if self.piece is not None:
            held = held.narrow(self.dim, self.piece.shard_start, self.piece.length)
        return held.contiguous().cpu()


def own_parts(model: nn.Module, rank: int, host: Sequence[int]) -> list[OwnPart]:
    """The parts that this rank writes.

    host: the ranks that write to the same folder, which share the work by bytes. Those of another
    folder write what they hold there.
    """
    mine: list[OwnPart] = []
    written = dict.fromkeys(host, 0)
    for value, names in tensor_names(model).items():
        record = record_of(value)
        size = record.group.size if record is not None else 1
        for part_rank in range(size):
            kept: list[Piece | None] = [None]
            if record is not None:
                kept = [*pieces(record.cut, size, part_rank)]
            dim = record.cut.dim if record is not None else 0
            parts = [OwnPart(names[0], value, dim, piece) for piece in kept]
            holders = [other for other in host if other % size == part_rank]
            if not holders:
                continue
            writer = min(holders, key=written.__getitem__)
            written[writer] += sum(part.nbytes for part in parts)
            mine += parts if writer == rank else []
    return mine


def write_parts(
    folder: Path, parts: Sequence[OwnPart], rank: int, host: int, save: str
) -> dict[str, File]:
    """Write the parts into unfinished files of this rank; what is in each, by its final name.

    host, save: see `File` and `SAVE_KEY`.
    """
    files = _in_files(parts)
    described = {}
    for number, chosen in enumerate(files, 1):
        name = f"shard-{rank + 1:05}-model-{number:05}-of-{len(files):05}.safetensors"
        tensors = {part.name: part.tensor() for part in chosen}
        path = folder / (name + PARTIAL)
        save_file(tensors, path, metadata=_header(chosen, save))
        with open(path, "rb") as written:
            os.fsync(written.fileno())
            nbytes = os.fstat(written.fileno()).st_size
        described[name] = File(host=host, nbytes=nbytes, parts=_described(chosen, tensors))
    return described


def _in_files(parts: Sequence[OwnPart]) -> list[list[OwnPart]]:
    """Spread over files of some size, in each of which a name stands once."""
    files: list[list[OwnPart]] = []
    blocks: dict[str, int] = {}
    numbered = []
    for part in parts:
        blocks[part.name] = blocks.get(part.name, -1) + 1
        numbered.append((blocks[part.name], part))
    last = -1
    nbytes = 0
    for block, part in sorted(numbered, key=lambda one: one[0]):
        if block != last or nbytes + part.nbytes > FILE_BYTES:
            files.append([])
            nbytes = 0
        files[-1].append(part)
        last, nbytes = block, nbytes + part.nbytes
    return files


def _header(parts: Sequence[OwnPart], save: str) -> dict[str, str]:
    where = {part.name: {OFFSETS_KEY: list(part.offsets)} for part in parts}
    return {"format": "pt", "DCP_VERSION": "1.0", PARTS_KEY: json.dumps(where), SAVE_KEY: save}


def _described(parts: Sequence[OwnPart], tensors: Mapping[str, torch.Tensor]) -> dict[str, Part]:
    return {
        part.name: Part(
            offsets=part.offsets,
            shape=tuple(tensors[part.name].shape),
            checksum=checksum(tensors[part.name]),
        )
        for part in parts
    }

"""The tensors in the safetensors files of a checkpoint, and the parts of them that are read.

A checkpoint is one file, a folder with an index or a single `model.safetensors` (Hugging Face), or
a folder of parts: files whose headers say where each part lies in its tensor, as torch's
distributed checkpoint writes them and `save_checkpoint` does.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from fgtp_pass.checkpoint.lazy_tensor import joined_tensor, stored_tensor
from fgtp_pass.checkpoint.shard_index import INDEX_NAME, ShardIndex, read_index
from fgtp_pass.errors import CheckpointError
from fgtp_pass.weights.checksum import checksum

SUFFIX = ".safetensors"
# what torch.distributed.checkpoint.hf_storage writes into a file's header
PARTS_KEY = "DCP_SHARDING_INFO"
OFFSETS_KEY = "saved_offsets"
# what `save_checkpoint` writes beside it: files of one save have the same value
SAVE_KEY = "fgtp_save"

# Of a mapped file no more than this is resident: the mapping is made anew for each stretch.
_STRETCH = 32 * 2**20

Offsets = tuple[int, ...]


@dataclass
class ReadCount:
    """Bytes that were read from the files of a checkpoint."""

    bytes: int = 0


@dataclass(eq=False)
class StoredTensor:
    """One tensor in one file.

    checksum: what it was when it was saved, if that is known; compared when it is first read.
    """

    file: Path
    name: str
    count: ReadCount
    checksum: str | None = None
    compared: bool = False

    def read_into(
        self, out: torch.Tensor, shape: Sequence[int], stride: Sequence[int], offset: int
    ) -> None:
        """See `lazy_tensor.Stored`. Copies straight from the mapped file."""
        if self.checksum is not None and not self.compared:
            self._compare()
        rows = out.shape[0] if out.dim() else 1
        step = max(1, _STRETCH * rows // max(1, out.nbytes))
        for row in range(0, rows, step):
            with opened(self.file) as file:
                stored = file.get_tensor(self.name)
                there = stored.as_strided(shape, stride, offset + stored.storage_offset())
                here = out
                if out.dim():
                    here, there = out[row : row + step], there[row : row + step]
                here.copy_(there)
            if self.checksum is None:
                self.count.bytes += there.numel() * there.itemsize

    def _compare(self) -> None:
        """Compare the checksum. That reads all of it, so what is read afterwards is not counted."""
        with opened(self.file) as file:
            stored = file.get_tensor(self.name)
            found = checksum(stored)
        if found != self.checksum:
            raise CheckpointError(
                f"{self.file} is damaged: the checksum of its part of {self.name} is {found}, and "
                f"was {self.checksum} when it was saved."
            )
        self.count.bytes += stored.nbytes
        self.compared = True


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a checkpoint by name, unread.

    in_parts: whether its files hold parts, under the model's names. index: what
    `save_checkpoint` wrote beside them, if it did. count: what was read so far.
    """

    path: Path
    tensors: dict[str, torch.Tensor]
    in_parts: bool
    index: ShardIndex | None
    count: ReadCount = field(default_factory=ReadCount)


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """An open safetensors file. Raises CheckpointError with its name if it cannot be read."""
    try:
        with safe_open(file, framework="pt") as handle:
            yield handle
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{file} cannot be read, so it is missing or damaged: {error}"
        ) from error


def save_of(file: Path) -> str | None:
    """Which save of `save_checkpoint` the file is of, None if it is not of one."""
    with opened(file) as handle:
        saved: str | None = (handle.metadata() or {}).get(SAVE_KEY)
        return saved


def open_checkpoint(path: Path) -> Checkpoint:
    """What is in a checkpoint; reads headers only.

    Raises CheckpointError, with the file's name, for one that is missing, damaged or foreign.
    """
    index = read_index(path) if path.is_dir() else None
    count = ReadCount()
    tensors: dict[str, torch.Tensor] = {}
    parts: dict[str, dict[Offsets, torch.Tensor]] = {}
    for file in _listed(path, index) if index else _found(path):
        with opened(file) as handle:
            offsets = _offsets(file, handle)
            if index is not None:
                _compare_with_index(file, handle, offsets, index)
            elif SAVE_KEY in (handle.metadata() or {}):
                raise CheckpointError(
                    f"{path / INDEX_NAME} is missing: the shards there were not saved to the end, "
                    "or not copied with it."
                )
            for name in handle.keys():  # noqa: SIM118 (a handle is no mapping)
                value = handle.get_tensor(name)
                saved = index.files[file.name].parts[name].checksum if index else None
                lazy = stored_tensor(
                    StoredTensor(file, name, count, saved), value.shape, value.dtype
                )
                if offsets is not None:
                    parts.setdefault(name, {})[offsets[name]] = lazy
                elif tensors.setdefault(name, lazy) is not lazy:
                    raise CheckpointError(f"{path}: two files have a {name}; {file.name} is one.")
    for name, pieces in parts.items():
        shape = index.tensors[name].shape if index else _extent(pieces)
        dtype = next(iter(pieces.values())).dtype
        tensors[name] = joined_tensor(name, shape, dtype, list(pieces.items()))
    return Checkpoint(path, tensors, bool(parts), index, count)


def _offsets(file: Path, handle: Any) -> dict[str, Offsets] | None:
    """Where the parts in a file lie in their tensors; None for a file of whole tensors."""
    given = (handle.metadata() or {}).get(PARTS_KEY)
    if given is None:
        return None
    try:
        by_name = json.loads(given)
        return {n: tuple(map(int, by_name[n][OFFSETS_KEY])) for n in handle.keys()}  # noqa: SIM118
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{file} is damaged: its header does not say where its parts lie ({error!r})."
        ) from error


def _extent(pieces: Mapping[Offsets, torch.Tensor]) -> tuple[int, ...]:
    ends = [[o + n for o, n in zip(at, t.shape, strict=True)] for at, t in pieces.items()]
    return tuple(map(max, zip(*ends, strict=True)))


def _found(path: Path) -> list[Path]:
    """The files of a checkpoint without an index of ours."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise CheckpointError(
            f"there is no checkpoint at {path}. A model of the Hugging Face hub has to be "
            "downloaded first, with huggingface_hub.snapshot_download."
        )
    indices = sorted(path.glob(f"*{SUFFIX}.index.json"))
    standard = path / f"model{SUFFIX}"
    if indices:
        named = [index for index in indices if index.name == f"model{SUFFIX}.index.json"]
        return _of_index((named or indices)[0])
    if standard.exists():
        return [standard]
    files = sorted(path.glob(f"*{SUFFIX}"))
    if not files:
        raise CheckpointError(
            f"{path} has no safetensors files. A checkpoint in another format is converted by "
            "loading it once and calling save_pretrained."
        )
    return files


def _of_index(index: Path) -> list[Path]:
    """The files that a Hugging Face index names, which have what it says."""
    try:
        weight_map = dict(json.loads(index.read_text())["weight_map"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index} is damaged: {error!r}") from error
    by_file: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        by_file.setdefault(str(file), set()).add(name)
    for file, names in by_file.items():
        with opened(index.parent / file) as handle:
            missing = sorted(names.difference(handle.keys()))
        if missing:
            raise CheckpointError(
                f"{index.parent / file} is damaged, or of another checkpoint: {index.name} says "
                f"that it has {missing[0]}, and it has not."
            )
    return [index.parent / file for file in sorted(by_file)]


def _listed(folder: Path, index: ShardIndex) -> list[Path]:
    """The files of an index of ours that are here: all that a host saved, or none of them."""
    here = {file.name for file in folder.glob(f"*{SUFFIX}")}
    for name in sorted(here - index.files.keys()):
        raise CheckpointError(
            f"{folder / name} is not of the checkpoint that {INDEX_NAME} describes. Move it away."
        )
    hosts = {file.host for name, file in index.files.items() if name in here}
    for name, file in index.files.items():
        if name not in here and (file.host in hosts or not hosts):
            raise CheckpointError(f"{folder / name} is missing.")
        size = (folder / name).stat().st_size if name in here else file.nbytes
        if size != file.nbytes:
            raise CheckpointError(
                f"{folder / name} is damaged: it has {size} bytes, and had {file.nbytes} when it "
                "was saved."
            )
    return [folder / name for name in index.files if name in here]


def _compare_with_index(
    file: Path, handle: Any, offsets: Mapping[str, Offsets] | None, index: ShardIndex
) -> None:
    listed = index.files[file.name].parts
    found = {n: (at, tuple(handle.get_tensor(n).shape)) for n, at in (offsets or {}).items()}
    if found != {name: (part.offsets, part.shape) for name, part in listed.items()}:
        raise CheckpointError(
            f"{file} is damaged, or of another checkpoint: it has not the parts that {INDEX_NAME} "
            "lists."
        )

"""The JSON beside saved shards: the plan they were cut by, and what is in each file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from fgtp_pass.errors import CheckpointError
from fgtp_pass.plan.plan import Plan

INDEX_NAME = "fgtp_shards.json"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Part(_Frozen):
    """A part of a tensor in a file: where it lies in the tensor, and its checksum."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    checksum: str


class File(_Frozen):
    """A file with one part of each of some tensors.

    host: the lowest rank of those that saved to the same folder; where that was a local disk,
    other hosts have other files.
    """

    host: int
    nbytes: int
    parts: Mapping[str, Part]


class Tensor(_Frozen):
    """A tensor of the model. dtype: by its name in torch. tied: other names of the same tensor."""

    shape: tuple[int, ...]
    dtype: str
    tied: tuple[str, ...] = ()


class ShardIndex(_Frozen):
    """What `save_checkpoint` saved.

    plan: in force on the model, None if nothing was cut. data_parallel_size: ranks that saved.
    tensors: by name in the model. files: by file name, of all hosts.
    """

    version: Literal[1] = 1
    data_parallel_size: int
    plan: Plan | None
    tensors: Mapping[str, Tensor]
    files: Mapping[str, File]


def read_index(folder: Path) -> ShardIndex | None:
    """The index in a folder, None if it has none. Raises CheckpointError for a damaged one."""
    path = folder / INDEX_NAME
    try:
        return ShardIndex.model_validate_json(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError, ValidationError) as error:
        first = str(error).splitlines()[0]
        raise CheckpointError(f"{path} is damaged, or of another version: {first}") from error

"""A sharded parameter as torch's distributed checkpoint sees it: chunks of a whole tensor.

A chunk is a shard without its padding, one for each block that is cut.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from fgtp_pass.plan.plan import WeightCut
from fgtp_pass.weights import packing
from fgtp_pass.weights.cut import Piece, pieces

if TYPE_CHECKING:
    from fgtp_pass.weights.sharded_parameter import ShardRecord


def write_items(record: "ShardRecord", name: str) -> list[Any]:
    """What this rank can write. Of ranks that offer the same chunk torch chooses one."""
    properties = TensorProperties(dtype=record.shard.dtype)
    size = torch.Size(record.cut.shape)
    return [
        WriteItem(
            index=MetadataIndex(name, chunk.offsets),
            type=WriteItemType.SHARD,
            tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=size),
        )
        for chunk in chunks(record)
    ]


def chunks(record: "ShardRecord") -> list[ChunkStorageMetadata]:
    """The chunks that this rank holds; none where its shard is all padding."""
    return [_chunk(record.cut, piece) for piece in _pieces(record)]


def chunk_memory(record: "ShardRecord", index: MetadataIndex) -> torch.Tensor:
    """The part of the shard that is a chunk, to read or overwrite. A packed shard is unpacked."""
    packing.unpack(record.shard)
    for piece in _pieces(record):
        if _chunk(record.cut, piece).offsets == index.offset:
            return record.shard.narrow(record.cut.dim, piece.shard_start, piece.length)
    raise ValueError(f"{record.cut.fqn} has no chunk at {index.offset} on this rank.")


def _pieces(record: "ShardRecord") -> list[Piece]:
    return pieces(record.cut, record.group.size, record.group.rank)


def _chunk(cut: WeightCut, piece: Piece) -> ChunkStorageMetadata:
    offsets, sizes = [0] * len(cut.shape), list(cut.shape)
    offsets[cut.dim], sizes[cut.dim] = piece.start, piece.length
    return ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))

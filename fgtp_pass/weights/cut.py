"""One weight and its shards: how it is cut, and how it is put together again."""

from dataclasses import dataclass
from typing import Any

import torch

from fgtp_pass.collectives import functional
from fgtp_pass.collectives.functional import Emit
from fgtp_pass.collectives.groups import ComponentGroup
from fgtp_pass.plan.plan import WeightCut


@dataclass(frozen=True)
class Piece:
    """A stretch of the cut dim: where it starts in the full parameter and in the shard."""

    start: int
    shard_start: int
    length: int


def pieces(cut: WeightCut, size: int, rank: int) -> list[Piece]:
    """What a rank of a group keeps of a parameter: its columns of each block, without padding."""
    width = cut.block_width(size)
    block = cut.shape[cut.dim] // cut.blocks
    start = min(rank * width, block)
    length = min(width, block - start)
    blocks = range(cut.blocks) if length else ()
    return [Piece(number * block + start, number * width, length) for number in blocks]


def cut_local(full: torch.Tensor, cut: WeightCut, size: int, rank: int) -> torch.Tensor:
    """This rank's part of a full parameter: its columns of each block, padded with zeros."""
    shard = full.new_zeros(cut.shard_shape(size))
    for piece in pieces(cut, size, rank):
        part = full.narrow(cut.dim, piece.start, piece.length)
        shard.narrow(cut.dim, piece.shard_start, piece.length).copy_(part)
    return shard


def gather_weight(emit: Emit, group: ComponentGroup, cut: WeightCut, shard: Any) -> Any:
    """The full parameter from its shards: Cut -ag-> Whole, on any dim and with any blocks."""
    dim, k, width = cut.dim, group.size, cut.block_width(group.size)
    block = cut.shape[dim] // cut.blocks
    first = emit(torch.movedim, shard, dim, 0) if dim else shard
    rest = [size for i, size in enumerate(cut.shape) if i != dim]
    gathered = functional.all_gather(emit, group, emit(torch.Tensor.contiguous, first))
    by_rank = emit(torch.reshape, gathered, (k, cut.blocks, width, *rest))
    by_block = emit(torch.transpose, by_rank, 0, 1)
    padded = emit(torch.reshape, by_block, (cut.blocks, k * width, *rest))
    if k * width > block:
        padded = emit(torch.narrow, padded, 1, 0, block)
    whole = emit(torch.reshape, padded, (cut.shape[dim], *rest))
    return emit(torch.movedim, whole, 0, dim) if dim else whole

"""One weight and its shards: how it is cut, and how it is put together again."""

from typing import Any

import torch

from fgtp_pass import collectives
from fgtp_pass.collectives import ComponentGroup, Emit
from fgtp_pass.plan import WeightCut


def cut_local(full: torch.Tensor, cut: WeightCut, size: int, rank: int) -> torch.Tensor:
    """This rank's part of a full parameter: its columns of each block, padded with zeros."""
    width = cut.block_width(size)
    block = cut.shape[cut.dim] // cut.blocks
    start = min(rank * width, block)
    length = min(width, block - start)
    shard = full.new_zeros(cut.shard_shape(size))
    for number in range(cut.blocks):
        part = full.narrow(cut.dim, number * block + start, length)
        shard.narrow(cut.dim, number * width, length).copy_(part)
    return shard


def gather_weight(emit: Emit, group: ComponentGroup, cut: WeightCut, shard: Any) -> Any:
    """The full parameter from its shards: Cut -ag-> Whole, on any dim and with any blocks."""
    dim, k, width = cut.dim, group.size, cut.block_width(group.size)
    block = cut.shape[dim] // cut.blocks
    first = emit(torch.movedim, shard, dim, 0) if dim else shard
    rest = [size for i, size in enumerate(cut.shape) if i != dim]
    gathered = collectives.all_gather(emit, group, emit(torch.Tensor.contiguous, first))
    by_rank = emit(torch.reshape, gathered, (k, cut.blocks, width, *rest))
    by_block = emit(torch.transpose, by_rank, 0, 1)
    padded = emit(torch.reshape, by_block, (cut.blocks, k * width, *rest))
    if k * width > block:
        padded = emit(torch.narrow, padded, 1, 0, block)
    whole = emit(torch.reshape, padded, (cut.shape[dim], *rest))
    return emit(torch.movedim, whole, 0, dim) if dim else whole

"""Where the data of a parameter come from: a tensor, lazy or in memory, here or on rank 0."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from fgtp_pass.agreement.control_group import all_ranks
from fgtp_pass.agreement.message import Intent
from fgtp_pass.checkpoint.huge_pages import empty
from fgtp_pass.checkpoint.lazy_tensor import read_into
from fgtp_pass.checkpoint.names import Found
from fgtp_pass.collectives.groups import DataParallelGroup
from fgtp_pass.errors import CheckpointError
from fgtp_pass.plan.plan import WeightCut
from fgtp_pass.weights.cut import Piece, pieces


@dataclass(frozen=True)
class TensorSource:
    """Each rank takes what it keeps out of a tensor that it has itself.

    dtype, device: of what is taken.
    """

    name: str
    dtype: torch.dtype
    device: torch.device
    found: Found

    def whole(self) -> torch.Tensor:
        out = empty(self.found.tensor.shape, self.dtype, self.device)
        self.take(out)
        return out

    def shard(self, cut: WeightCut, size: int, rank: int) -> torch.Tensor:
        kept = pieces(cut, size, rank)
        out = _empty_shard(cut, size, kept, self.dtype, self.device)
        for piece in kept:
            self.take(out.narrow(cut.dim, piece.shard_start, piece.length), cut.dim, piece)
        return out

    def take(self, out: torch.Tensor, dim: int = 0, piece: Piece | None = None) -> None:
        """Copy a piece of the tensor, or all of it, into `out`."""
        first, *twins = (self.found.tensor, *self.found.twins)
        read_into(out, _narrow(first, dim, piece))
        for twin in twins:
            other = torch.empty_like(out)
            read_into(other, _narrow(twin, dim, piece))
            if not torch.equal(out, other):
                raise CheckpointError(
                    f"{self.name} is tied to another weight in the model, but was given two "
                    "different tensors. Set tie_word_embeddings=False in the model's config."
                )


@dataclass(frozen=True)
class BroadcastSource:
    """Rank 0 has the tensor, and sends each rank's part to all, one part after the other.

    Collective; a rank holds two parts at most. local: where rank 0 takes them from; None elsewhere.
    """

    name: str
    dtype: torch.dtype
    device: torch.device
    shape: Sequence[int]
    group: DataParallelGroup
    local: TensorSource | None

    def whole(self) -> torch.Tensor:
        out = empty(self.shape, self.dtype, self.device)
        self._send(out)
        return out

    def shard(self, cut: WeightCut, size: int, rank: int) -> torch.Tensor:
        out = _empty_shard(cut, size, pieces(cut, size, rank), self.dtype, self.device)
        for other in range(size):
            for piece in pieces(cut, size, other):
                place = out.narrow(cut.dim, piece.shard_start, piece.length)
                keeps = other == rank
                in_place = keeps and place.is_contiguous()
                part = place if in_place else place.new_empty(place.shape)
                self._send(part, cut.dim, piece)
                if keeps and not in_place:
                    place.copy_(part)
        return out

    def _send(self, part: torch.Tensor, dim: int = 0, piece: Piece | None = None) -> None:
        if self.local is not None:
            self.local.take(part, dim, piece)
        # a rank that failed has said so, and is not waited for
        all_ranks(self.group).exchange(Intent.LOAD)
        dist.broadcast(part, src=self.group.ranks[0], group=self.group.data_group(self.group.size))


def _empty_shard(
    cut: WeightCut, size: int, kept: Sequence[Piece], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Memory for a shard, zeros where some of it is padding."""
    shape = cut.shard_shape(size)
    is_full = sum(piece.length for piece in kept) == shape[cut.dim]
    shard = empty(shape, dtype, device)
    return shard if is_full else shard.zero_()


def _narrow(tensor: torch.Tensor, dim: int, piece: Piece | None) -> torch.Tensor:
    return tensor if piece is None else tensor.narrow(dim, piece.start, piece.length)

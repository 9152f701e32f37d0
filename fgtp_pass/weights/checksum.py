"""A checksum of a weight, bit for bit: ranks that cut one weight between them must hold the same.

Sums of 64-bit words, wrapping around: by row of a fixed width, which tells words that changed rows,
and by column, which tells those that moved within one. Both read a chunk while it is in the cache,
so it runs at about half the speed at which memory is read.
"""

import hashlib

import torch

_COLUMNS = 512  # 64-bit words in a row
_CHUNK_ROWS = 256  # 1 MiB, less than a core's cache
_WORD = 8


def checksum(weight: torch.Tensor) -> str:
    """16 hex digits, equal for tensors of equal bytes in row-major order, of any dtype and device.

    Reads the memory once and needs 1/512 of it beside, or a copy where it is not contiguous.
    """
    data = weight.detach().contiguous().flatten().view(torch.uint8)
    if data.storage_offset() % _WORD:
        data = data.clone()
    even = data.numel() // (_COLUMNS * _WORD) * _COLUMNS * _WORD
    words = data[:even].view(torch.int64).view(-1, _COLUMNS)
    by_row = words.new_zeros(len(words))
    by_column = words.new_zeros(_COLUMNS)
    step = _CHUNK_ROWS if weight.device.type == "cpu" else max(1, len(words))
    for start in range(0, len(words), step):
        chunk = words[start : start + step]
        by_row[start : start + step] = chunk.sum(1)
        by_column += chunk.sum(0)
    digest = hashlib.blake2b(str((data.numel(), weight.dtype)).encode(), digest_size=8)
    # a copy of the rest, since numpy() makes a storage one that cannot be resized any more
    for part in (by_row, by_column, data[even:].clone()):
        digest.update(part.cpu().numpy().tobytes())
    return digest.hexdigest()

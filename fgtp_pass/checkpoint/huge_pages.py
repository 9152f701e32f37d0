"""Memory for what is read: to touch it page by page costs more than to read cached files."""

import ctypes
import mmap
import sys
from collections.abc import Sequence

import torch

_HUGE = 2 * 2**20


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """As `torch.empty`; on the CPU in huge pages where the system gives them (Linux)."""
    made = torch.empty(tuple(shape), dtype=dtype, device=device)
    if made.device.type == "cpu" and sys.platform == "linux" and made.nbytes > _HUGE:
        # only pages that are all its own, so that no more memory becomes resident
        start = -(-made.data_ptr() // _HUGE) * _HUGE
        length = (made.data_ptr() + made.nbytes) // _HUGE * _HUGE - start
        if length > 0:
            advise = ctypes.CDLL(None).madvise
            advise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_HUGEPAGE)
    return made

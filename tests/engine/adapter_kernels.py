"""Kernels for adapters that are one op of a graph, and take rows of padding, as those of GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

_library = torch.library.Library("fgtp_test", "DEF")
_library.define("add_pairs(Tensor(a!) y, Tensor x, Tensor[] a, Tensor[] b, Tensor which) -> ()")
_library.define("add_b(Tensor(a!) y, Tensor x, Tensor b, Tensor which) -> ()")


def _add_b(y: torch.Tensor, x: torch.Tensor, b: torch.Tensor, which: torch.Tensor) -> None:
    """which: the slot of each row's adapter, -1 for none."""
    for row, slot in enumerate(which[: x.shape[0]].tolist()):
        if slot >= 0:
            y[row] += b[slot, 0] @ x[row]


def _add_pairs(
    y: torch.Tensor,
    x: torch.Tensor,
    a: Sequence[torch.Tensor],
    b: Sequence[torch.Tensor],
    which: torch.Tensor,
) -> None:
    """One pair for each part of the features of y, side by side."""
    assert y.is_contiguous()  # as kernels of GPUs want it
    parts = y.split([part.shape[2] for part in b], -1)
    for part, one_a, one_b in zip(parts, a, b, strict=True):
        for row, slot in enumerate(which[: x.shape[0]].tolist()):
            if slot >= 0:
                part[row] += one_b[slot, 0] @ (one_a[slot, 0] @ x[row])


for _name, _body in (("add_pairs", _add_pairs), ("add_b", _add_b)):
    _library.impl(_name, _body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fgtp_test::{_name}", lambda *_: None, lib=_library)


class OpKernels(PunicaWrapperCPU):  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._token_lora_indices.fill_(-1)  # as the largest batch does, with which GPUs begin
        self._embeddings_indices.zero_()

    def add_lora_linear(self, y: Any, x: Any, a: Any, b: Any, *_: Any, **__: Any) -> None:
        torch.ops.fgtp_test.add_pairs(y, x, list(a), list(b), self._token_lora_indices)

    def add_lora_embedding(self, y: Any, x: Any, b: Any, *_: Any, **__: Any) -> None:
        torch.ops.fgtp_test.add_b(y, x, b, self._token_lora_indices)

"""patterns/lm_head.py: one head: every rank makes its part of the vocabulary for all tokens."""

import torch
import torch.nn.functional as F
from marks import quick
from minimal import check_graphs, linear
from torch import nn

pytestmark = quick


class Head(nn.Module):
    """A head is known by the attention before it, or by a table as tall as it is wide."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.head = linear(8, 24), linear(8, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.head(x + F.scaled_dot_product_attention(q, k, v))


BEFORE = """\
input qkv.weight: float32[24, 8]
input L_x_: float32[1, 3, 8]
input head.weight: float32[16, 8]
%3: float32[1, 3, 24] = linear(L_x_, qkv.weight, None)
%4: tuple = .chunk(%3, 3, -1)
%5: float32[1, 3, 8] = getitem(%4, 0)
%6: float32[1, 3, 8] = getitem(%4, 1)
%7: float32[1, 3, 8] = getitem(%4, 2)
%8: float32[1, 3, 8] = scaled_dot_product_attention(%5, %6, %7)
%9: float32[1, 3, 8] = add(L_x_, %8)
%10: float32[1, 3, 16] = linear(%9, head.weight, None)
return [%10]
"""

AFTER = """\
input qkv.weight: float32[24, 8]
input L_x_: float32[1, 3, 8]
input head.weight: float32[8, 8]
%3: float32[1, 3, 24] = linear(L_x_, qkv.weight, None)
%4: tuple = .chunk(%3, 3, -1)
%5: float32[1, 3, 8] = getitem(%4, 0)
%6: float32[1, 3, 8] = getitem(%4, 1)
%7: float32[1, 3, 8] = getitem(%4, 2)
%8: float32[1, 3, 8] = scaled_dot_product_attention(%5, %6, %7)
%9: float32[1, 3, 8] = add(L_x_, %8)
%10: float32[3, 8] = reshape(%9, [-1, 8])
%11: float32[6, 8] = _c10d_functional::all_gather_into_tensor(%10, 2, ranks_0_to_1)
%12: float32[6, 8] = _c10d_functional::wait_tensor(%11)
%13: float32[6, 8] = linear(%12, head.weight, None)
%14: float32[6, 8] = _c10d_functional::all_to_all_single(%13, [3, 3], [3, 3], ranks_0_to_1)
%15: float32[6, 8] = _c10d_functional::wait_tensor(%14)
%16: float32[2, 3, 1, 8] = reshape(%15, [2, 3, 1, 8])
%17: float32[3, 1, 2, 8] = permute(%16, [1, 2, 0, 3])
%18: float32[3, 1, 16] = reshape(%17, [3, 1, 16])
%19: float32[3, 16] = reshape(%18, [3, 16])
%20: float32[1, 3, 16] = reshape(%19, [1, 3, 16])
return [%20]
"""


def test_lm_head(update: bool) -> None:
    check_graphs(__file__, Head(), torch.zeros(1, 3, 8), update)

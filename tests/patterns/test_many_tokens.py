"""plan/token_ranges.py: a step with many tokens gathers the weights, each ahead of its turn."""

import torch
import torch.nn.functional as F
from marks import quick
from minimal import check_graphs, linear
from torch import nn

pytestmark = quick


class Layer(nn.Module):
    """An attention of one head, and an FFN with a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.o, self.up, self.down = linear(8, 8), linear(8, 12), linear(12, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.o(F.scaled_dot_product_attention(x, x, x))
        return x + self.down(F.gelu(self.up(x)))


BEFORE = """\
input L_x_: float32[64, 8]
input o.weight: float32[8, 8]
input up.weight: float32[12, 8]
input down.weight: float32[8, 12]
%4: float32[64, 8] = scaled_dot_product_attention(L_x_, L_x_, L_x_)
%5: float32[64, 8] = linear(%4, o.weight, None)
%6: float32[64, 8] = add(L_x_, %5)
%7: float32[64, 12] = linear(%6, up.weight, None)
%8: float32[64, 12] = gelu(%7)
%9: float32[64, 8] = linear(%8, down.weight, None)
%10: float32[64, 8] = add(%6, %9)
return [%10]
"""

AFTER = """\
input L_x_: float32[64, 8]
input o.weight: float32[8, 4]
input up.weight: float32[6, 8]
input down.weight: float32[8, 6]
%4: float32[64, 8] = scaled_dot_product_attention(L_x_, L_x_, L_x_)
%5: float32[64, 8] = reshape(%4, [-1, 8])
%6: float32[8, 4] = fgtp_pass::plain(o.weight)
%7: float32[16, 4] = _c10d_functional::all_gather_into_tensor(%6, 2, ranks_0_to_1)
%8: float32[6, 8] = fgtp_pass::plain(up.weight)
%9: float32[12, 8] = _c10d_functional::all_gather_into_tensor(%8, 2, ranks_0_to_1)
%10: float32[16, 4] = _c10d_functional::wait_tensor(%7)
%11: float32[8, 4] = narrow(%10, 0, 0, 8)
%12: float32[8, 4] = narrow(%10, 0, 8, 8)
%13: float32[64, 4] = narrow(%5, 1, 0, 4)
%14: float32[64, 8] = linear(%13, %11)
%15: float32[64, 4] = narrow(%5, 1, 4, 4)
%16: float32[64, 8] = linear(%15, %12)
%17: float32[64, 8] = add(%14, %16)
%18: float32[64, 8] = add(L_x_, %17)
%19: float32[64, 8] = reshape(%18, [-1, 8])
%20: float32[8, 6] = fgtp_pass::plain(down.weight)
%21: float32[16, 6] = _c10d_functional::all_gather_into_tensor(%20, 2, ranks_0_to_1)
%22: float32[12, 8] = _c10d_functional::wait_tensor(%9)
%23: float32[64, 12] = linear(%19, %22)
%24: float32[64, 12] = gelu(%23)
%25: float32[16, 6] = _c10d_functional::wait_tensor(%21)
%26: float32[8, 6] = narrow(%25, 0, 0, 8)
%27: float32[8, 6] = narrow(%25, 0, 8, 8)
%28: float32[64, 6] = narrow(%24, 1, 0, 6)
%29: float32[64, 8] = linear(%28, %26)
%30: float32[64, 6] = narrow(%24, 1, 6, 6)
%31: float32[64, 8] = linear(%30, %27)
%32: float32[64, 8] = add(%29, %31)
%33: float32[64, 8] = add(%18, %32)
return [%33]
"""


def test_many_tokens(update: bool) -> None:
    check_graphs(__file__, Layer(), torch.zeros(64, 8), update)

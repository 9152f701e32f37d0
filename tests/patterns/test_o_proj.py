"""patterns/o_proj.py: one attention: what it returns is multiplied with half of the outputs."""

import torch
import torch.nn.functional as F
from marks import quick
from minimal import check_graphs, linear
from torch import nn

pytestmark = quick


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (linear(8, 8) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = [w(x).unflatten(-1, (2, 4)).transpose(1, 2) for w in (self.q, self.k, self.v)]
        core = F.scaled_dot_product_attention(*heads)
        return x + self.o(core.transpose(1, 2).reshape(x.shape))


BEFORE = """\
input L_x_: float32[1, 2, 8]
input q.weight: float32[8, 8]
input k.weight: float32[8, 8]
input v.weight: float32[8, 8]
input o.weight: float32[8, 8]
%5: float32[1, 2, 8] = linear(L_x_, q.weight, None)
%6: float32[1, 2, 2, 4] = .unflatten(%5, -1, [2, 4])
%7: float32[1, 2, 2, 4] = .transpose(%6, 1, 2)
%8: float32[1, 2, 8] = linear(L_x_, k.weight, None)
%9: float32[1, 2, 2, 4] = .unflatten(%8, -1, [2, 4])
%10: float32[1, 2, 2, 4] = .transpose(%9, 1, 2)
%11: float32[1, 2, 8] = linear(L_x_, v.weight, None)
%12: float32[1, 2, 2, 4] = .unflatten(%11, -1, [2, 4])
%13: float32[1, 2, 2, 4] = .transpose(%12, 1, 2)
%14: float32[1, 2, 2, 4] = scaled_dot_product_attention(%7, %10, %13)
%15: float32[1, 2, 2, 4] = .transpose(%14, 1, 2)
%16: float32[1, 2, 8] = .reshape(%15, [1, 2, 8])
%17: float32[1, 2, 8] = linear(%16, o.weight, None)
%18: float32[1, 2, 8] = add(L_x_, %17)
return [%18]
"""

AFTER = """\
input L_x_: float32[1, 2, 8]
input q.weight: float32[8, 8]
input k.weight: float32[8, 8]
input v.weight: float32[8, 8]
input o.weight: float32[4, 8]
%5: float32[1, 2, 8] = linear(L_x_, q.weight, None)
%6: float32[1, 2, 2, 4] = .unflatten(%5, -1, [2, 4])
%7: float32[1, 2, 2, 4] = .transpose(%6, 1, 2)
%8: float32[1, 2, 8] = linear(L_x_, k.weight, None)
%9: float32[1, 2, 2, 4] = .unflatten(%8, -1, [2, 4])
%10: float32[1, 2, 2, 4] = .transpose(%9, 1, 2)
%11: float32[1, 2, 8] = linear(L_x_, v.weight, None)
%12: float32[1, 2, 2, 4] = .unflatten(%11, -1, [2, 4])
%13: float32[1, 2, 2, 4] = .transpose(%12, 1, 2)
%14: float32[1, 2, 2, 4] = scaled_dot_product_attention(%7, %10, %13)
%15: float32[1, 2, 2, 4] = .transpose(%14, 1, 2)
%16: float32[1, 2, 8] = .reshape(%15, [1, 2, 8])
%17: float32[2, 8] = reshape(%16, [-1, 8])
%18: float32[4, 8] = _c10d_functional::all_gather_into_tensor(%17, 2, ranks_0_to_1)
%19: float32[4, 8] = _c10d_functional::wait_tensor(%18)
%20: float32[4, 4] = linear(%19, o.weight, None)
%21: float32[4, 4] = _c10d_functional::all_to_all_single(%20, [2, 2], [2, 2], ranks_0_to_1)
%22: float32[4, 4] = _c10d_functional::wait_tensor(%21)
%23: float32[2, 2, 1, 4] = reshape(%22, [2, 2, 1, 4])
%24: float32[2, 1, 2, 4] = permute(%23, [1, 2, 0, 3])
%25: float32[2, 1, 8] = reshape(%24, [2, 1, 8])
%26: float32[2, 8] = reshape(%25, [2, 8])
%27: float32[1, 2, 8] = reshape(%26, [1, 2, 8])
%28: float32[1, 2, 8] = add(L_x_, %27)
return [%28]
"""


def test_o_proj(update: bool) -> None:
    check_graphs(__file__, Attention(), torch.zeros(1, 2, 8), update)

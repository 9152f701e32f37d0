"""patterns/dense_ffn.py: one FFN: its inner features are cut, nothing moves between its matmuls."""

import torch
import torch.nn.functional as F
from marks import quick
from minimal import check_graphs, linear
from torch import nn

pytestmark = quick


class FFN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = linear(8, 12), linear(8, 12), linear(12, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


BEFORE = """\
input gate.weight: float32[12, 8]
input L_x_: float32[1, 3, 8]
input up.weight: float32[12, 8]
input down.weight: float32[8, 12]
%4: float32[1, 3, 12] = linear(L_x_, gate.weight, None)
%5: float32[1, 3, 12] = silu(%4)
%6: float32[1, 3, 12] = linear(L_x_, up.weight, None)
%7: float32[1, 3, 12] = mul(%5, %6)
%8: float32[1, 3, 8] = linear(%7, down.weight, None)
%9: float32[1, 3, 8] = add(L_x_, %8)
return [%9]
"""

AFTER = """\
input gate.weight: float32[6, 8]
input L_x_: float32[1, 3, 8]
input up.weight: float32[6, 8]
input down.weight: float32[8, 6]
%4: float32[3, 8] = reshape(L_x_, [-1, 8])
%5: float32[6, 8] = _c10d_functional::all_gather_into_tensor(%4, 2, ranks_0_to_1)
%6: float32[6, 8] = _c10d_functional::wait_tensor(%5)
%7: float32[6, 6] = linear(%6, gate.weight, None)
%8: float32[6, 6] = linear(%6, up.weight, None)
%9: float32[6, 6] = silu(%7)
%10: float32[6, 6] = mul(%9, %8)
%11: float32[6, 8] = linear(%10, down.weight, None)
%12: float32[3, 8] = _c10d_functional::reduce_scatter_tensor(%11, sum, 2, ranks_0_to_1)
%13: float32[3, 8] = _c10d_functional::wait_tensor(%12)
%14: float32[1, 3, 8] = reshape(%13, [1, 3, 8])
%15: float32[1, 3, 8] = add(L_x_, %14)
return [%15]
"""


def test_dense_ffn(update: bool) -> None:
    check_graphs(__file__, FFN(), torch.zeros(1, 3, 8), update)

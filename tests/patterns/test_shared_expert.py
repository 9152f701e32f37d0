"""patterns/shared_expert.py: an FFN beside experts is cut as a dense one; experts stay whole."""

import torch
import torch.nn.functional as F
from marks import quick
from minimal import check_graphs, linear
from torch import nn

pytestmark = quick


class MixtureOfExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router, self.gate = linear(8, 4), linear(8, 1)
        self.up, self.down = linear(8, 12), linear(12, 8)
        self.experts = nn.Parameter(torch.zeros(4, 8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, chosen = self.router(x).softmax(-1).max(-1)
        experts = torch.einsum("bti,btio->bto", x, self.experts[chosen])
        shared = self.gate(x).sigmoid() * self.down(F.silu(self.up(x)))
        return x + experts * weight.unsqueeze(-1) + shared


BEFORE = """\
input router.weight: float32[4, 8]
input L_x_: float32[1, 3, 8]
input experts: float32[4, 8, 8]
input gate.weight: float32[1, 8]
input up.weight: float32[12, 8]
input down.weight: float32[8, 12]
%6: float32[1, 3, 4] = linear(L_x_, router.weight, None)
%7: float32[1, 3, 4] = .softmax(%6, -1)
%8: max = .max(%7, -1)
%9: float32[1, 3] = getitem(%8, 0)
%10: int64[1, 3] = getitem(%8, 1)
%11: float32[1, 3, 8, 8] = getitem(experts, %10)
%12: float32[1, 3, 8] = einsum(bti,btio->bto, L_x_, %11)
%13: float32[1, 3, 1] = linear(L_x_, gate.weight, None)
%14: float32[1, 3, 1] = .sigmoid(%13)
%15: float32[1, 3, 12] = linear(L_x_, up.weight, None)
%16: float32[1, 3, 12] = silu(%15)
%17: float32[1, 3, 8] = linear(%16, down.weight, None)
%18: float32[1, 3, 8] = mul(%14, %17)
%19: float32[1, 3, 1] = .unsqueeze(%9, -1)
%20: float32[1, 3, 8] = mul(%12, %19)
%21: float32[1, 3, 8] = add(L_x_, %20)
%22: float32[1, 3, 8] = add(%21, %18)
return [%22]
"""

AFTER = """\
input router.weight: float32[4, 8]
input L_x_: float32[1, 3, 8]
input experts: float32[4, 8, 8]
input gate.weight: float32[1, 8]
input up.weight: float32[6, 8]
input down.weight: float32[8, 6]
%6: float32[1, 3, 4] = linear(L_x_, router.weight, None)
%7: float32[1, 3, 4] = .softmax(%6, -1)
%8: max = .max(%7, -1)
%9: float32[1, 3] = getitem(%8, 0)
%10: int64[1, 3] = getitem(%8, 1)
%11: float32[1, 3, 8, 8] = getitem(experts, %10)
%12: float32[1, 3, 8] = einsum(bti,btio->bto, L_x_, %11)
%13: float32[1, 3, 1] = linear(L_x_, gate.weight, None)
%14: float32[1, 3, 1] = .sigmoid(%13)
%15: float32[3, 8] = reshape(L_x_, [-1, 8])
%16: float32[6, 8] = _c10d_functional::all_gather_into_tensor(%15, 2, ranks_0_to_1)
%17: float32[6, 8] = _c10d_functional::wait_tensor(%16)
%18: float32[6, 6] = linear(%17, up.weight, None)
%19: float32[6, 6] = silu(%18)
%20: float32[6, 8] = linear(%19, down.weight, None)
%21: float32[3, 8] = _c10d_functional::reduce_scatter_tensor(%20, sum, 2, ranks_0_to_1)
%22: float32[3, 8] = _c10d_functional::wait_tensor(%21)
%23: float32[1, 3, 8] = reshape(%22, [1, 3, 8])
%24: float32[1, 3, 8] = mul(%14, %23)
%25: float32[1, 3, 1] = .unsqueeze(%9, -1)
%26: float32[1, 3, 8] = mul(%12, %25)
%27: float32[1, 3, 8] = add(L_x_, %26)
%28: float32[1, 3, 8] = add(%27, %24)
return [%28]
"""


def test_shared_expert(update: bool) -> None:
    check_graphs(
        __file__, MixtureOfExperts(), torch.zeros(1, 3, 8), update, components=("sharedexpert",)
    )

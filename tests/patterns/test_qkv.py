"""patterns/qkv.py: q, k and v share an all_gather and an all_to_all, of latent attention too."""

import torch
import torch.nn.functional as F
from marks import quick
from minimal import check_graphs, linear
from torch import nn

pytestmark = quick


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv = linear(8, 8), linear(8, 8)  # one KV head for both

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.q(x).unflatten(-1, (2, 4)).transpose(1, 2)
        k, v = self.kv(x).unsqueeze(1).chunk(2, -1)
        return x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)


class Latent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_a, self.norm, self.q_b = linear(8, 4), nn.LayerNorm(4), linear(4, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.q_b(self.norm(self.q_a(x)))
        return x + F.scaled_dot_product_attention(q, x, x)


BEFORE = """\
input q.weight: float32[8, 8]
input L_x_: float32[1, 2, 8]
input kv.weight: float32[8, 8]
%3: float32[1, 2, 8] = linear(L_x_, q.weight, None)
%4: float32[1, 2, 2, 4] = .unflatten(%3, -1, [2, 4])
%5: float32[1, 2, 2, 4] = .transpose(%4, 1, 2)
%6: float32[1, 2, 8] = linear(L_x_, kv.weight, None)
%7: float32[1, 1, 2, 8] = .unsqueeze(%6, 1)
%8: tuple = .chunk(%7, 2, -1)
%9: float32[1, 1, 2, 4] = getitem(%8, 0)
%10: float32[1, 1, 2, 4] = getitem(%8, 1)
%11: float32[1, 2, 2, 4] = scaled_dot_product_attention(%5, %9, %10)
%12: float32[1, 2, 2, 4] = .transpose(%11, 1, 2)
%13: float32[1, 2, 8] = .reshape(%12, [1, 2, 8])
%14: float32[1, 2, 8] = add(L_x_, %13)
return [%14]
"""

AFTER = """\
input q.weight: float32[4, 8]
input L_x_: float32[1, 2, 8]
input kv.weight: float32[4, 8]
%3: float32[2, 8] = reshape(L_x_, [-1, 8])
%4: float32[4, 8] = _c10d_functional::all_gather_into_tensor(%3, 2, ranks_0_to_1)
%5: float32[4, 8] = _c10d_functional::wait_tensor(%4)
%6: float32[4, 4] = linear(%5, q.weight, None)
%7: float32[4, 4] = linear(%5, kv.weight, None)
%8: float32[4, 8] = cat([%6, %7], 1)
%9: float32[4, 8] = _c10d_functional::all_to_all_single(%8, [2, 2], [2, 2], ranks_0_to_1)
%10: float32[4, 8] = _c10d_functional::wait_tensor(%9)
%11: float32[4, 4] = narrow(%10, 1, 0, 4)
%12: float32[4, 4] = narrow(%10, 1, 4, 4)
%13: float32[2, 2, 1, 4] = reshape(%11, [2, 2, 1, 4])
%14: float32[2, 1, 2, 4] = permute(%13, [1, 2, 0, 3])
%15: float32[2, 1, 8] = reshape(%14, [2, 1, 8])
%16: float32[2, 8] = reshape(%15, [2, 8])
%17: float32[2, 2, 1, 4] = reshape(%12, [2, 2, 1, 4])
%18: float32[2, 1, 2, 4] = permute(%17, [1, 2, 0, 3])
%19: float32[2, 1, 8] = reshape(%18, [2, 1, 8])
%20: float32[2, 8] = reshape(%19, [2, 8])
%21: float32[1, 2, 8] = reshape(%16, [1, 2, 8])
%22: float32[1, 2, 8] = reshape(%20, [1, 2, 8])
%23: float32[1, 2, 2, 4] = .unflatten(%21, -1, [2, 4])
%24: float32[1, 2, 2, 4] = .transpose(%23, 1, 2)
%25: float32[1, 1, 2, 8] = .unsqueeze(%22, 1)
%26: tuple = .chunk(%25, 2, -1)
%27: float32[1, 1, 2, 4] = getitem(%26, 0)
%28: float32[1, 1, 2, 4] = getitem(%26, 1)
%29: float32[1, 2, 2, 4] = scaled_dot_product_attention(%24, %27, %28)
%30: float32[1, 2, 2, 4] = .transpose(%29, 1, 2)
%31: float32[1, 2, 8] = .reshape(%30, [1, 2, 8])
%32: float32[1, 2, 8] = add(L_x_, %31)
return [%32]
"""

LATENT_BEFORE = """\
input q_a.weight: float32[4, 8]
input L_x_: float32[1, 2, 8]
input norm.weight: float32[4]
input norm.bias: float32[4]
input q_b.weight: float32[8, 4]
%5: float32[1, 2, 4] = linear(L_x_, q_a.weight, None)
%6: float32[1, 2, 4] = layer_norm(%5, [4], norm.weight, norm.bias, 1e-05)
%7: float32[1, 2, 8] = linear(%6, q_b.weight, None)
%8: float32[1, 2, 8] = scaled_dot_product_attention(%7, L_x_, L_x_)
%9: float32[1, 2, 8] = add(L_x_, %8)
return [%9]
"""

LATENT_AFTER = """\
input q_a.weight: float32[2, 8]
input L_x_: float32[1, 2, 8]
input norm.weight: float32[4]
input norm.bias: float32[4]
input q_b.weight: float32[4, 4]
%5: float32[2, 8] = reshape(L_x_, [-1, 8])
%6: float32[2, 8] = fgtp_pass::plain(q_a.weight)
%7: float32[4, 8] = _c10d_functional::all_gather_into_tensor(%6, 2, ranks_0_to_1)
%8: float32[4, 8] = _c10d_functional::wait_tensor(%7)
%9: float32[2, 4] = linear(%5, %8)
%10: float32[1, 2, 4] = reshape(%9, [1, 2, 4])
%11: float32[1, 2, 4] = layer_norm(%10, [4], norm.weight, norm.bias, 1e-05)
%12: float32[2, 4] = reshape(%11, [-1, 4])
%13: float32[4, 4] = _c10d_functional::all_gather_into_tensor(%12, 2, ranks_0_to_1)
%14: float32[4, 4] = _c10d_functional::wait_tensor(%13)
%15: float32[4, 4] = linear(%14, q_b.weight, None)
%16: float32[4, 4] = _c10d_functional::all_to_all_single(%15, [2, 2], [2, 2], ranks_0_to_1)
%17: float32[4, 4] = _c10d_functional::wait_tensor(%16)
%18: float32[2, 2, 1, 4] = reshape(%17, [2, 2, 1, 4])
%19: float32[2, 1, 2, 4] = permute(%18, [1, 2, 0, 3])
%20: float32[2, 1, 8] = reshape(%19, [2, 1, 8])
%21: float32[2, 8] = reshape(%20, [2, 8])
%22: float32[1, 2, 8] = reshape(%21, [1, 2, 8])
%23: float32[1, 2, 8] = scaled_dot_product_attention(%22, L_x_, L_x_)
%24: float32[1, 2, 8] = add(L_x_, %23)
return [%24]
"""


def test_qkv(update: bool) -> None:
    check_graphs(__file__, Attention(), torch.zeros(1, 2, 8), update, components=("qkv",))


def test_latent(update: bool) -> None:
    check_graphs(__file__, Latent(), torch.zeros(1, 2, 8), update, "LATENT_", components=("qkv",))

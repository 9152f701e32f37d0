"""detect/touching.py: what one layer becomes where an o_proj touches an FFN."""

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from marks import quick
from minimal import check_graphs, linear
from torch import nn

import fgtp_pass

pytestmark = quick


class Layer(nn.Module):
    """An attention of one head, and an FFN; `forward` of the subclasses joins them."""

    def __init__(self) -> None:
        super().__init__()
        self.o, self.up, self.down = linear(8, 8), linear(8, 12), linear(12, 8)
        self.norm, self.second = nn.RMSNorm(8, eps=1e-6), nn.RMSNorm(8, eps=1e-6)

    def attention(self, x: torch.Tensor) -> torch.Tensor:
        return self.o(F.scaled_dot_product_attention(x, x, x))

    def ffn(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.up(x)))


class Behind(Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(x)
        return x + self.ffn(self.norm(x))


class Beside(Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.attention(x) + self.ffn(self.norm(x))


class Sandwich(Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.second(self.attention(x))
        return x + self.ffn(self.norm(x))


class Mixed(Layer):
    """What stands between is not local to a token."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(x)
        return x + self.ffn(x - x.mean(0, keepdim=True))


class Written(Layer):
    """The residual stream is changed in place before the FFN has read it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(x)
        y = self.norm(x)
        y.mul_(2)
        return x + self.ffn(y)


class WrittenLater(Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(x)
        y = self.ffn(self.norm(x))
        x.mul_(2)
        return x + y


PATHS: dict[type[Layer], tuple[str, str]] = {
    Behind: (
        "Own -all_to_all-> Cut x W[in/k] -> Sum + residual -all_reduce-> All",
        "All x W[out/k] -> Cut x W[in/k] -> Sum -reduce_scatter-> Own",
    ),
    Beside: (
        "Own -all_to_all-> Cut x W[in/k] -> Sum",
        "Own -all_gather-> All x W[out/k] -> Cut x W[in/k] -> Sum + oproj -reduce_scatter-> Own",
    ),
    Sandwich: (
        "Own -all_gather-> All x W[out/k] -> Cut + residual -all_gather-> All",
        "All x W[out/k] -> Cut x W[in/k] -> Sum -reduce_scatter-> Own",
    ),
}
PATHS[WrittenLater] = PATHS[Behind]
APART = (
    "Own -all_gather-> All x W[out/k] -> Cut -all_to_all-> Own",
    "Own -all_gather-> All x W[out/k] -> Cut x W[in/k] -> Sum -reduce_scatter-> Own",
)


@pytest.mark.parametrize("layer", [Behind, Beside, Sandwich, Mixed, Written, WrittenLater])
def test_paths_of_a_layer(layer: type[Layer]) -> None:
    options: dict[str, Any] = {"data_parallel_size": 2}
    plan = fgtp_pass.make_plan(layer().eval(), (torch.zeros(2, 8),), **options)
    assert tuple(site.path for site in plan.sites) == PATHS.get(layer, APART)


BEHIND_BEFORE = """\
input L_x_: float32[2, 8]
input o.weight: float32[8, 8]
input norm.weight: float32[8]
input up.weight: float32[12, 8]
input down.weight: float32[8, 12]
%5: float32[2, 8] = scaled_dot_product_attention(L_x_, L_x_, L_x_)
%6: float32[2, 8] = linear(%5, o.weight, None)
%7: float32[2, 8] = add(L_x_, %6)
%8: float32[2, 8] = rms_norm(%7, [8], norm.weight, 1e-06)
%9: float32[2, 12] = linear(%8, up.weight, None)
%10: float32[2, 12] = gelu(%9)
%11: float32[2, 8] = linear(%10, down.weight, None)
%12: float32[2, 8] = add(%7, %11)
return [%12]
"""

BEHIND_AFTER = """\
input L_x_: float32[2, 8]
input o.weight: float32[8, 4]
input norm.weight: float32[8]
input up.weight: float32[6, 8]
input down.weight: float32[8, 6]
%5: float32[2, 8] = scaled_dot_product_attention(L_x_, L_x_, L_x_)
%6: float32[2, 8] = reshape(%5, [-1, 8])
%7: float32[2, 8] = reshape(L_x_, [-1, 8])
%8: float32[2, 2, 4] = reshape(%6, [2, 2, 4])
%9: float32[2, 2, 4] = transpose(%8, 0, 1)
%10: float32[4, 4] = reshape(%9, [4, 4])
%11: float32[4, 4] = _c10d_functional::all_to_all_single(%10, [2, 2], [2, 2], ranks_0_to_1)
%12: float32[4, 4] = _c10d_functional::wait_tensor(%11)
%13: float32[4, 8] = linear(%12, o.weight, None)
%14: float32[4, 8] = pad(%7, [0, 0, 0, 2])
%15: float32[4, 8] = add(%13, %14)
%16: float32[4, 8] = _c10d_functional::all_reduce(%15, sum, ranks_0_to_1)
%17: float32[4, 8] = _c10d_functional::wait_tensor(%16)
%18: float32[2, 8] = narrow(%17, 0, 0, 2)
%19: float32[4, 8] = rms_norm(%17, [8], norm.weight, 1e-06)
%20: float32[4, 6] = linear(%19, up.weight, None)
%21: float32[4, 6] = gelu(%20)
%22: float32[4, 8] = linear(%21, down.weight, None)
%23: float32[2, 8] = _c10d_functional::reduce_scatter_tensor(%22, sum, 2, ranks_0_to_1)
%24: float32[2, 8] = _c10d_functional::wait_tensor(%23)
%25: float32[2, 8] = add(%18, %24)
return [%25]
"""

BESIDE_BEFORE = """\
input L_x_: float32[2, 8]
input o.weight: float32[8, 8]
input norm.weight: float32[8]
input up.weight: float32[12, 8]
input down.weight: float32[8, 12]
%5: float32[2, 8] = scaled_dot_product_attention(L_x_, L_x_, L_x_)
%6: float32[2, 8] = linear(%5, o.weight, None)
%7: float32[2, 8] = add(L_x_, %6)
%8: float32[2, 8] = rms_norm(L_x_, [8], norm.weight, 1e-06)
%9: float32[2, 12] = linear(%8, up.weight, None)
%10: float32[2, 12] = gelu(%9)
%11: float32[2, 8] = linear(%10, down.weight, None)
%12: float32[2, 8] = add(%7, %11)
return [%12]
"""

BESIDE_AFTER = """\
input L_x_: float32[2, 8]
input o.weight: float32[8, 4]
input norm.weight: float32[8]
input up.weight: float32[6, 8]
input down.weight: float32[8, 6]
%5: float32[2, 8] = scaled_dot_product_attention(L_x_, L_x_, L_x_)
%6: float32[2, 8] = reshape(%5, [-1, 8])
%7: float32[2, 2, 4] = reshape(%6, [2, 2, 4])
%8: float32[2, 2, 4] = transpose(%7, 0, 1)
%9: float32[4, 4] = reshape(%8, [4, 4])
%10: float32[4, 4] = _c10d_functional::all_to_all_single(%9, [2, 2], [2, 2], ranks_0_to_1)
%11: float32[4, 4] = _c10d_functional::wait_tensor(%10)
%12: float32[4, 8] = linear(%11, o.weight, None)
%13: float32[2, 8] = rms_norm(L_x_, [8], norm.weight, 1e-06)
%14: float32[2, 8] = reshape(%13, [-1, 8])
%15: float32[4, 8] = _c10d_functional::all_gather_into_tensor(%14, 2, ranks_0_to_1)
%16: float32[4, 8] = _c10d_functional::wait_tensor(%15)
%17: float32[4, 6] = linear(%16, up.weight, None)
%18: float32[4, 6] = gelu(%17)
%19: float32[4, 8] = linear(%18, down.weight, None)
%20: float32[4, 8] = add(%19, %12)
%21: float32[2, 8] = _c10d_functional::reduce_scatter_tensor(%20, sum, 2, ranks_0_to_1)
%22: float32[2, 8] = _c10d_functional::wait_tensor(%21)
%23: float32[2, 8] = add(L_x_, %22)
return [%23]
"""

SANDWICH_BEFORE = """\
input L_x_: float32[2, 8]
input o.weight: float32[8, 8]
input second.weight: float32[8]
input norm.weight: float32[8]
input up.weight: float32[12, 8]
input down.weight: float32[8, 12]
%6: float32[2, 8] = scaled_dot_product_attention(L_x_, L_x_, L_x_)
%7: float32[2, 8] = linear(%6, o.weight, None)
%8: float32[2, 8] = rms_norm(%7, [8], second.weight, 1e-06)
%9: float32[2, 8] = add(L_x_, %8)
%10: float32[2, 8] = rms_norm(%9, [8], norm.weight, 1e-06)
%11: float32[2, 12] = linear(%10, up.weight, None)
%12: float32[2, 12] = gelu(%11)
%13: float32[2, 8] = linear(%12, down.weight, None)
%14: float32[2, 8] = add(%9, %13)
return [%14]
"""

SANDWICH_AFTER = """\
input L_x_: float32[2, 8]
input o.weight: float32[4, 8]
input second.weight: float32[8]
input norm.weight: float32[8]
input up.weight: float32[6, 8]
input down.weight: float32[8, 6]
%6: float32[2, 8] = scaled_dot_product_attention(L_x_, L_x_, L_x_)
%7: float32[2, 8] = reshape(%6, [-1, 8])
%8: float32[2, 8] = reshape(L_x_, [-1, 8])
%9: float32[4, 8] = _c10d_functional::all_gather_into_tensor(%7, 2, ranks_0_to_1)
%10: float32[4, 8] = _c10d_functional::wait_tensor(%9)
%11: float32[4, 4] = linear(%10, o.weight, None)
%12: float32[4, 4] = reshape(%8, [4, 4])
%13: float32[8, 4] = cat([%11, %12])
%14: float32[16, 4] = _c10d_functional::all_gather_into_tensor(%13, 2, ranks_0_to_1)
%15: float32[16, 4] = _c10d_functional::wait_tensor(%14)
%16: float32[2, 2, 4, 4] = reshape(%15, [2, 2, 4, 4])
%17: float32[2, 4, 4] = select(%16, 1, 0)
%18: float32[2, 4, 4] = select(%16, 1, 1)
%19: float32[2, 4, 1, 4] = reshape(%17, [2, 4, 1, 4])
%20: float32[4, 1, 2, 4] = permute(%19, [1, 2, 0, 3])
%21: float32[4, 1, 8] = reshape(%20, [4, 1, 8])
%22: float32[4, 8] = reshape(%21, [4, 8])
%23: float32[4, 8] = reshape(%18, [4, 8])
%24: float32[4, 8] = rms_norm(%22, [8], second.weight, 1e-06)
%25: float32[4, 8] = add(%23, %24)
%26: float32[2, 8] = narrow(%25, 0, 0, 2)
%27: float32[4, 8] = rms_norm(%25, [8], norm.weight, 1e-06)
%28: float32[4, 6] = linear(%27, up.weight, None)
%29: float32[4, 6] = gelu(%28)
%30: float32[4, 8] = linear(%29, down.weight, None)
%31: float32[2, 8] = _c10d_functional::reduce_scatter_tensor(%30, sum, 2, ranks_0_to_1)
%32: float32[2, 8] = _c10d_functional::wait_tensor(%31)
%33: float32[2, 8] = add(%26, %32)
return [%33]
"""


@pytest.mark.parametrize("layer", [Behind, Beside, Sandwich])
def test_graph_of_a_layer(layer: type[Layer], update: bool) -> None:
    of = f"{layer.__name__.upper()}_"
    check_graphs(__file__, layer(), torch.zeros(2, 8), update, of)


def test_messages() -> None:
    """Three for four, in each kind of layer."""
    for layer in PATHS:
        (graph,) = fgtp_pass.snapshot_graphs(
            layer().eval(), (torch.zeros(2, 8),), data_parallel_size=2
        )
        assert sum(Counter(graph.collectives).values()) == 3

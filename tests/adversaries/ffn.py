"""FFNs: what may stand between the projections, and how the projections may be spelled."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adversaries.common import (
    ANY,
    BROKEN,
    DIM,
    FUSED,
    INNER,
    NO_MLP,
    STD,
    TOKENS,
    UNGATED,
    Block,
    Body,
    Case,
    Expect,
    buffer,
    chained_layer,
    linear,
    plain_ffn,
    registry,
    swiglu,
    vector,
)

CASES: dict[str, Case] = {}
case = registry(CASES, "ffn")

# Every feature for itself: what goes into the down projection can be cut.
POINTWISE: dict[str, Body] = {
    "silu_in_place": lambda m, x: F.silu(m.gate(x), inplace=True).mul_(m.up(x)),
    "view_as_heads": lambda m, x: (
        m.gate(x).unflatten(-1, (4, -1)).tanh() * m.up(x).unflatten(-1, (4, -1))
    ).flatten(2),
    "through_half": lambda m, x: (F.silu(m.gate(x).half().float()) * m.up(x)).type_as(x).to(x),
    "squeezed_singleton": lambda m, x: F.silu(m.gate(x.unsqueeze(1)).squeeze(1)) * m.up(x),
    "flat_into_shaped": lambda m, x: swiglu(m, x.reshape(-1, DIM)).view(
        x.shape[0], x.shape[1], INNER
    ),
}

# Features or tokens meet, or values are random: cut, it would be another function.
MIXING: dict[str, Body] = {
    "softmax": lambda m, x: F.softmax(m.gate(x), -1) * m.up(x),
    "rms_norm_by_hand": lambda m, x: (
        (h := swiglu(m, x)) * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    ),
    "activation_quantized_per_token": lambda m, x: (
        ((h := swiglu(m, x)) / (s := h.abs().amax(-1, keepdim=True) / 127 + 1e-5)).round() * s
    ),
    "top_k_features": lambda m, x: (
        torch.where((g := m.gate(x)) >= g.topk(8, -1).values[..., -1:], g, 0) * m.up(x)
    ),
    "cumsum_of_features": lambda m, x: m.gate(x).cumsum(-1) * m.up(x),
    "rolled_features": lambda m, x: m.gate(x).tanh().roll(1, -1) * m.up(x),
    "rolled_tokens": lambda m, x: m.gate(x).tanh().roll(1, 1) * m.up(x),
    "up_reads_another_norm": lambda m, x: F.silu(m.gate(x)) * m.up(F.layer_norm(x, (DIM,))),
    "gate_of_the_first_token": lambda m, x: F.silu(m.gate(x)[:, :1]) * m.up(x),
    "tokens_transposed": lambda m, x: (
        m.gate(x).tanh().transpose(0, 1) * m.up(x.transpose(0, 1))
    ).transpose(0, 1),
    "complex": lambda m, x: torch.complex(m.gate(x), m.up(x)).abs(),
    "dtype_view": lambda m, x: (
        (m.gate(x).view(torch.int32) & 0x7FFFFFFF).view(torch.float32) * m.up(x)
    ),
    "noise": lambda m, x: (h := swiglu(m, x)) + 0.1 * torch.rand_like(h),
    "rrelu_in_training": lambda m, x: F.rrelu(m.gate(x), training=True) * m.up(x),
    "dropout_in_training": lambda m, x: F.dropout(swiglu(m, x), 0.5, training=True),
}


def between(name: str, expect: Expect, inner: Body) -> None:
    case(name, expect)(lambda m, x: m.down(inner(m, x)))


for _name, _inner in POINTWISE.items():
    between(_name, STD, _inner)
for _name, _inner in MIXING.items():
    between(_name, NO_MLP, _inner)


# Norms and vectors between the projections.

case("bitnet_norm", NO_MLP, norm=lambda: nn.RMSNorm(INNER))(
    lambda m, x: m.down(m.norm(F.relu(m.gate(x)).square() * m.up(x)))
)

case("prelu_of_one_weight", act=nn.PReLU, **UNGATED)(lambda m, x: m.down(m.act(m.up(x))))

case("scale_and_shift_vectors", scale=vector(INNER), shift=vector(INNER))(
    lambda m, x: m.down(F.silu(m.gate(x) * m.scale + m.shift) * m.up(x))
)

case("scale_used_outside_too", scale=vector(INNER))(
    lambda m, x: m.down(F.silu(m.gate(x) * m.scale) * m.up(x)) * m.scale.mean()
)

case("scale_per_token", NO_MLP, scale=vector(TOKENS, 1))(
    lambda m, x: m.down(swiglu(m, x) * m.scale)
)

case("scale_is_a_buffer", scale=buffer(INNER))(lambda m, x: m.down(swiglu(m, x) * m.scale))


# Fused gate and up, in all spellings.


@case("fused_swapped_halves", **FUSED)
def _(m: Block, x: Tensor) -> Tensor:
    h = m.both(x)
    return m.down(F.silu(h[..., INNER:]) * h[..., :INNER])


@case("fused_negative_slices", **FUSED)
def _(m: Block, x: Tensor) -> Tensor:
    h = m.both(x)
    return m.down(F.silu(h[..., -INNER:]) * h[:, :, :-INNER])


case("fused_glu", **FUSED)(lambda m, x: m.down(F.glu(m.both(x), -1)))


case("fused_glu_by_position", **FUSED)(lambda m, x: m.down(F.glu(m.both(x))))
case("fused_glu_of_wider", NO_MLP, both=linear(DIM, 2 * INNER), up=None, gate=None)(
    lambda m, x: m.down(F.glu(F.glu(torch.cat([m.both(x), m.both(x)], -1))))
)


@case("fused_view_of_blocks", **FUSED)
def _(m: Block, x: Tensor) -> Tensor:
    a, b = m.both(x).view(*x.shape[:-1], 2, INNER).unbind(-2)
    return m.down(F.silu(a) * b)


@case("fused_interleaved", NO_MLP, **FUSED)
def _(m: Block, x: Tensor) -> Tensor:
    h = m.both(x)
    return m.down(F.silu(h[..., ::2]) * h[..., 1::2])


@case("fused_view_interleaved", NO_MLP, **FUSED)
def _(m: Block, x: Tensor) -> Tensor:
    a, b = m.both(x).view(*x.shape[:-1], INNER, 2).unbind(-1)
    return m.down(F.silu(a) * b)


@case(
    "fused_three_chunks_of_odd_width", **FUSED | {"both": linear(DIM, 99), "down": linear(33, DIM)}
)
def _(m: Block, x: Tensor) -> Tensor:
    a, b, c = m.both(x).chunk(3, -1)
    return m.down(F.silu(a) * b + c.tanh())


@case("fused_uneven_chunks", NO_MLP, **FUSED | {"both": linear(DIM, 2 * INNER - 1)})
def _(m: Block, x: Tensor) -> Tensor:
    a, b = m.both(x).chunk(2, -1)
    return m.down(F.silu(a) * F.pad(b, (0, 1)))


@case("fused_scaled_whole_and_half", full=vector(2 * INNER), part=vector(INNER), **FUSED)
def _(m: Block, x: Tensor) -> Tensor:
    a, b = (m.both(x) * m.full).chunk(2, -1)
    return m.down(F.silu(a * m.part) * b)


@case("fused_half_written_in_place", NO_MLP, **FUSED)
def _(m: Block, x: Tensor) -> Tensor:
    h = m.both(x)
    a, b = h.chunk(2, -1)
    F.silu(a, inplace=True)
    return m.down(h[..., :INNER] * b)


# Concatenations and shapes.

case("two_ups_concatenated", NO_MLP, up=linear(DIM, INNER // 2), gate=linear(DIM, INNER // 2))(
    lambda m, x: m.down(F.gelu(torch.cat([m.gate(x), m.up(x)], -1)))
)

case("flat_out_of_shaped")(lambda m, x: m.down(swiglu(m, x).view(-1, INNER)).view_as(x))


@case("other_leading_dims")
def _(m: Block, x: Tensor) -> Tensor:
    batch, tokens, _ = x.shape
    return m.down(swiglu(m, x).view(tokens, batch, INNER)).view_as(x)


@case("tokens_read_as_features", NO_MLP, **UNGATED)
def _(m: Block, x: Tensor) -> Tensor:
    batch, tokens, _ = x.shape
    h = F.gelu(m.up(x).reshape(batch, INNER, tokens))
    return m.down(h.reshape(batch, tokens, INNER))


@case("features_read_as_tokens", NO_MLP, up=linear(DIM, 2 * DIM), down=linear(DIM, DIM), **UNGATED)
def _(m: Block, x: Tensor) -> Tensor:
    batch, tokens, _ = x.shape
    h = F.gelu(m.up(x)).view(batch, 2 * tokens, DIM)
    return m.down(h).view(batch, tokens, 2, DIM).sum(2)


case("every_token_with_every_token", NO_MLP)(
    lambda m, x: m.down(F.silu(m.gate(x)).unsqueeze(1) * m.up(x).unsqueeze(2)).mean(2)
)


# In-place writes.


@case("gate_written_through_a_view", NO_MLP)
def _(m: Block, x: Tensor) -> Tensor:
    h = m.gate(x)
    h.view(-1, INNER).relu_()
    return m.down(h * m.up(x))


@case("out_argument", NO_MLP)
def _(m: Block, x: Tensor) -> Tensor:
    h = m.gate(x)
    torch.mul(h, 2.0, out=h)
    return m.down(h.tanh() * m.up(x))


@case("input_overwritten_before_down")
def _(m: Block, x: Tensor) -> Tensor:
    y = x * 1
    h = swiglu(m, y)
    y.view(-1).mul_(3.0)
    return m.down(h) + y


@case("residual_added_to_before_down", **UNGATED)
def _(m: Block, x: Tensor) -> Tensor:
    y = x * 1
    h = F.gelu(m.up(y))
    y.add_(1.0)
    return y + m.down(h)


# What the matmuls and the ops between them read must be what it was where they stood.


@case("divisor_updated_before_down", NO_MLP, amax=buffer(1), **UNGATED)
def _(m: Block, x: Tensor) -> Tensor:
    h = F.relu(m.up(x) / m.amax)
    m.amax.mul_(0.9).add_(x.abs().amax() * 0.1)
    return m.down(h)


@case("divisor_updated_through_a_view", NO_MLP, scales=buffer(2), **UNGATED)
def _(m: Block, x: Tensor) -> Tensor:
    h = F.relu(m.up(x) / m.scales[1])
    m.scales.view(2, 1)[1:].mul_(3.0)
    return m.down(h)


@case("divisor_updated_after_down", NO_MLP, amax=buffer(1), **UNGATED)  # an idle rank's is not
def _(m: Block, x: Tensor) -> Tensor:
    y = m.down(F.relu(m.up(x) / m.amax))
    m.amax.mul_(3.0)
    return y


@case("input_changed_between_two_copies_of_it", NO_MLP)
def _(m: Block, x: Tensor) -> Tensor:
    y = x * 1
    before = y.double()
    y.mul_(2.0)
    return m.down(F.silu(m.gate(before.float())) * m.up(y))


@case("cast_that_is_no_copy", NO_MLP)
def _(m: Block, x: Tensor) -> Tensor:
    y = x * 1
    h = swiglu(m, y.float())  # y itself
    y.view(-1).mul_(3.0)
    return m.down(h) + y


# The same activation, or nearly.

ROUNDED = {
    "through_bfloat16": lambda x: x.bfloat16().float(),
    "through_float8": lambda x: x.to(torch.float8_e4m3fn).float(),
    "through_int8": lambda x: (x * 16).to(torch.int8).float(),
    "dropout_in_training": lambda x: F.dropout(x, 0.5, training=True),
}


def reads(name: str, expect: Expect, change: Callable[[Tensor], Tensor]) -> None:
    case(f"gate_reads_{name}", expect)(lambda m, x: m.down(F.silu(m.gate(change(x))) * m.up(x)))


for _name, _change in ROUNDED.items():
    reads(_name, NO_MLP, _change)
reads("through_double", STD, lambda x: x.double().float())
reads("a_view", STD, lambda x: x.flatten(0, 1).unflatten(0, x.shape[:2]))


@case("inner_value_used_outside_too", NO_MLP)
def _(m: Block, x: Tensor) -> Tensor:
    h = F.silu(m.gate(x))
    return m.down(h * m.up(x)) + h.mean()


@case("graph_break_before_down", BROKEN)
def _(m: Block, x: Tensor) -> Tensor:
    h = swiglu(m, x)
    torch._dynamo.graph_break()
    return m.down(h)


@case("graph_break_after_the_only_up", BROKEN, layer_body=chained_layer, **UNGATED)
def _(m: Block, x: Tensor) -> Tensor:
    h = F.gelu(m.up(x))
    torch._dynamo.graph_break()
    return m.down(h)


@case("autocast", ANY)
def _(m: Block, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return plain_ffn(m, x).float()

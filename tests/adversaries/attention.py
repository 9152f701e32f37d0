"""Attention without an output projection, with several, with an odd core, across graph breaks."""

import torch
import torch.nn.functional as F
from torch import Tensor

from adversaries.common import (
    BROKEN,
    DIM,
    INNER,
    Block,
    Case,
    attention,
    chained_layer,
    core,
    ids,
    layer,
    linear,
    registry,
    sdpa,
    stack,
    std,
)

CASES: dict[str, Case] = {}
case = registry(CASES, "attn")
model_case = registry(CASES)

NO_QKVO = dict.fromkeys("qkvo")
FUSED_QKV = {**NO_QKVO, "qkv": linear(DIM, 3 * DIM)}


def without_o() -> Block:
    return Block({"qkv": linear(DIM, 3 * DIM)}, lambda m, x: sdpa(*m.qkv(x).chunk(3, dim=-1)))


@model_case("no_o_then_the_next_qkv", std(oproj=(), mlp=()), layers=stack(3, without_o))
def _(m: Block, i: Tensor) -> Tensor:
    x = m.emb(i)
    for one in m.layers:
        x = m.norm(one(x))
    return m.head(x)


@case(
    "no_o_then_an_ffn",
    std(oproj=("layers.*.attn.up.weight",)),
    **FUSED_QKV,
    up=linear(DIM, INNER),
    down=linear(INNER, DIM),
)
def _(m: Block, x: Tensor) -> Tensor:
    """What reads the core is its projection, though an activation follows."""
    return m.down(F.gelu(m.up(sdpa(*m.qkv(x).chunk(3, dim=-1)))))


case("core_times_gate", gate=linear(DIM, DIM))(
    lambda m, x: m.o(core(m, x) * torch.sigmoid(m.gate(x)))
)


@model_case(
    "first_layer_values_mixed_in", std(oproj=("layers.*.o.weight",)), layers=stack(3, attention)
)
def _(m: Block, i: Tensor) -> Tensor:
    x, first = m.emb(i), None
    for one in m.layers:
        v = one.v(x)
        first = v if first is None else first
        x = x + one.o(sdpa(one.q(x), one.k(x), 0.5 * v + 0.5 * first))
    return m.head(x)


@case("two_o_of_one_core", std(oproj=("layers.*.attn.o*",)), o2=linear(DIM, DIM))
def _(m: Block, x: Tensor) -> Tensor:
    c = core(m, x)
    return m.o(c) + m.o2(c.tanh())


case("low_rank_o", std(oproj=("layers.*.attn.a.*",)), o=None, a=linear(DIM, 8), b=linear(8, DIM))(
    lambda m, x: m.b(m.a(core(m, x)))
)

case("no_softmax")(lambda m, x: m.o((m.q(x) @ m.k(x).transpose(-1, -2)).tril() @ m.v(x)))


@case("einsum")
def _(m: Block, x: Tensor) -> Tensor:
    p = torch.einsum("bqd,bkd->bqk", m.q(x), m.k(x)).softmax(-1)
    return m.o(torch.einsum("bqk,bkd->bqd", p, m.v(x)))


@case("o_as_an_einsum_over_heads")
def _(m: Block, x: Tensor) -> Tensor:
    heads = core(m, x).unflatten(-1, (4, -1))
    return torch.einsum("bshd,ohd->bso", heads, m.o.weight.unflatten(-1, (4, -1)))


@case("flat_tokens", args=lambda: (ids()[0],))
def _(m: Block, x: Tensor) -> Tensor:
    """The layout of serving engines: no batch dimension."""
    return m.o(core(m, x[None]))[0]


@case("graph_break_before_o", BROKEN)
def _(m: Block, x: Tensor) -> Tensor:
    c = core(m, x)
    torch._dynamo.graph_break()
    return m.o(c)


@case(
    "graph_break_after_fused_qkv",
    BROKEN,
    layer_body=chained_layer,
    **FUSED_QKV | {"o": linear(DIM, DIM)},
)
def _(m: Block, x: Tensor) -> Tensor:
    """A wide projection is all that the first graph returns, as if it were a head."""
    qkv = m.qkv(x)
    torch._dynamo.graph_break()
    return m.o(sdpa(*qkv.chunk(3, dim=-1)))


@case("core_overwritten_after_o")
def _(m: Block, x: Tensor) -> Tensor:
    c = core(m, x)
    y = m.o(c)
    c.zero_()
    return y + c


def in_place_residuals(m: Block, x: Tensor) -> Tensor:
    x = m.attn(m.n1(x)).add_(x)
    return m.ffn(m.n2(x)).mul_(1.5).add_(x)


case("results_written_in_place", layer_body=in_place_residuals)(lambda m, x: m.o(core(m, x)))


@model_case(
    "cross_attention",
    std(
        oproj=("layers.*.attn.o.*", "encoder.attn.o.*", "cross.o.*"),
        mlp=("layers.*.ffn.*", "encoder.ffn.*"),
    ),
    args=lambda: (ids(5), ids(5)),
    encoder=layer,
    cross=attention,
)
def _(m: Block, i: Tensor, j: Tensor) -> Tensor:
    e, x = m.encoder(m.emb(i)), m.layers[0](m.emb(j))
    x = x + m.cross.o(sdpa(m.cross.q(x), m.cross.k(e), m.cross.v(e)))
    return m.head(m.norm(x))

"""Lookups of tables, and of weights: who picks the rows, and what a parameter is and serves for."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adversaries.common import (
    ANY,
    DIM,
    FFN,
    INNER,
    NO_EMBEDDING,
    NO_MLP,
    STD,
    TOKENS,
    UNGATED,
    VOCAB,
    Block,
    Case,
    Expect,
    Part,
    buffer,
    hidden,
    ids,
    linear,
    positions,
    registry,
    stack,
    std,
    swiglu,
    table,
    vector,
    weight,
)

CASES: dict[str, Case] = {}
case = registry(CASES)
ffn_case = registry(CASES, "ffn")

TIED = std(lmhead=("emb.weight",))
GIVEN_HIDDEN = std(embedding=(), lmhead=())
NO_LINEARS = dict.fromkeys(FFN)


# Who picks the rows.

case("table_indexed")(lambda m, i: m.head(m.encode(m.emb.weight[i] * DIM**0.5)))
case("one_hot_times_table")(
    lambda m, i: m.head(m.encode(F.one_hot(i, VOCAB).to(m.emb.weight.dtype) @ m.emb.weight))
)
case("table_renormalised_by_lookup", NO_EMBEDDING, emb=table(VOCAB, max_norm=1.0))(
    lambda m, i: m.logits(i)
)
case("bag_of_tokens", bag=lambda: nn.EmbeddingBag(VOCAB, DIM))(
    lambda m, i: m.logits(i) + m.head(m.bag(i))[:, None]
)
case("ids_masked_and_clamped")(
    lambda m, i: m.logits(torch.where(i < 5, 0, i).clamp(0, VOCAB - 1).long())
)
case("ids_hashed_in_pairs", pairs=table(VOCAB))(
    lambda m, i: m.head(m.encode(m.emb(i) + m.pairs((i * 31 + i.roll(1, -1)) % VOCAB)))
)


def with_rows_given(name: str, rows: int, given: Any, expect: Expect = STD) -> None:
    """A second table of which the caller picks the rows."""
    case(name, expect, args=lambda: (ids(), given()), extra=table(rows))(
        lambda m, i, p: m.head(m.encode(m.emb(i) + m.extra(p)))
    )


def instead_of_ids(name: str, rows: int, given: Any, head: Part | None) -> None:
    """Hidden states are given, and the rows of the only table."""
    expect = std(embedding=(), lmhead=("head.*",) if head else ())
    case(name, expect, args=lambda: (hidden(), given()), emb=None, head=head, extra=table(rows))(
        lambda m, x, p: m.head(m.encode(x + m.extra(p))) if head else m.encode(x + m.extra(p))
    )


with_rows_given("positions_given", 256, positions)
instead_of_ids("positions_beside_hidden_states", 128, positions, None)
instead_of_ids("segments_beside_hidden_states", 2, lambda: torch.zeros_like(ids()), None)
case(
    "more_positions_than_vocabulary",
    args=lambda: (ids(), positions()),
    head=None,
    extra=table(512),
)(lambda m, i, p: m.encode(m.emb(i) + m.extra(p)))


@case(
    "table_for_every_layer",
    std(embedding=("emb.weight", "each.weight")),
    each=table(VOCAB, 2 * 8),
    gates=stack(2, linear(DIM, 8)),
    outs=stack(2, linear(8, DIM)),
)
def _(m: Block, i: Tensor) -> Tensor:
    x, each = m.emb(i), m.each(i).unflatten(-1, (2, 8))
    for j, one in enumerate(m.layers):
        x = one(x)
        x = x + m.outs[j](F.gelu(m.gates[j](x)) * each[:, :, j])
    return m.head(m.norm(x))


@case("ids_overwritten_after_lookup")
def _(m: Block, i: Tensor) -> Tensor:
    i = i.clone()
    x = m.emb(i)
    i.zero_()
    return m.head(m.encode(x)) + i[..., None]


@case("result_of_lookup_written")
def _(m: Block, i: Tensor) -> Tensor:
    x = m.emb(i)
    x[:, 0] = 0
    x.mul_(2)
    return m.head(m.encode(x))


# One parameter in several roles.

case("layers_shared_as_in_albert")(lambda m, i: m.head(m.encode(m.encode(m.emb(i)))))
case("weights_used_again_elsewhere")(
    lambda m, i: (
        m.head(x := m.encode(m.emb(i))),
        F.linear(x, m.layers[0].ffn.gate.weight),
        m.layers[0].attn.o.weight.sum(),
    )
)


@case("tied_three_times", TIED, head=None)
def _(m: Block, i: Tensor) -> tuple[Tensor, ...]:
    """A table, two heads, and expected embeddings."""
    x = m.encode(m.emb(i))
    logits = F.linear(x, m.emb.weight)
    return logits, F.linear(x.tanh(), m.emb.weight), logits.softmax(-1) @ m.emb.weight


SQUARE = {**UNGATED, "up": linear(DIM, DIM), "down": linear(DIM, DIM)}

ffn_case("down_is_up_transposed", **NO_LINEARS | {"w": weight(INNER, DIM)})(
    lambda m, x: F.gelu(F.linear(x, m.w)) @ m.w
)
ffn_case("down_is_up", **SQUARE | {"down": None})(lambda m, x: m.up(F.gelu(m.up(x))))
ffn_case("gate_is_up", **UNGATED)(lambda m, x: m.down(F.silu(m.up(x)) * m.up(x)))
ffn_case("bias_is_a_scale_too", b=vector(INNER))(
    lambda m, x: m.down(F.silu(F.linear(x, m.gate.weight, m.b)) * m.up(x) * m.b)
)
ffn_case("bias_before_and_after_the_cut", b=vector(DIM), **SQUARE)(
    lambda m, x: F.linear(F.gelu(F.linear(x, m.up.weight, m.b)), m.down.weight, m.b)
)


# What a bias is.


def biased(name: str, bias: Any, make: Part, expect: Expect = STD) -> None:
    ffn_case(name, expect, b=make)(
        lambda m, x: m.down(F.gelu(F.linear(x, m.gate.weight, bias(m))) * m.up(x))
    )


biased("bias_negated", lambda m: -m.b, vector(INNER), NO_MLP)
biased("bias_is_a_buffer", lambda m: m.b, buffer(INNER))
biased(
    "bias_in_double", lambda m: m.b.float(), make=lambda: nn.Parameter(torch.rand(INNER).double())
)
ffn_case("bias_of_down_is_a_buffer", b=buffer(DIM))(
    lambda m, x: F.linear(swiglu(m, x), m.down.weight, m.b)
)
ffn_case("bias_of_down_is_computed")(
    lambda m, x: F.linear(swiglu(m, x), m.down.weight, torch.ones(DIM))
)


# What a weight is.

MATRICES = {**NO_LINEARS, "u": weight(DIM, INNER), "d": weight(INNER, DIM)}


def integers(*shape: int) -> Part:
    return lambda: nn.Parameter(torch.randint(-8, 8, shape, dtype=torch.int8), requires_grad=False)


def cast(m: Any, x: Tensor, linear: Any) -> Tensor:
    """An FFN by another function for its projections."""
    return linear(m.down.weight, F.silu(linear(m.gate.weight, x)) * linear(m.up.weight, x))


ffn_case("einsum_for_linear")(
    lambda m, x: cast(m, x, lambda w, t: torch.einsum("bsi,oi->bso", t, w))
)
ffn_case("cast_twice")(lambda m, x: cast(m, x, lambda w, t: F.linear(t, w.bfloat16().float())))
ffn_case("weights_sliced", NO_MLP)(
    lambda m, x: F.linear(
        F.silu(F.linear(x, m.gate.weight[:48])) * F.linear(x, m.up.weight[:48]),
        m.down.weight[:, :48],
    )
)
ffn_case("weight_scaled", NO_MLP)(lambda m, x: F.linear(swiglu(m, x), m.down.weight * 0.5))
ffn_case("int8_cast", q=integers(DIM, INNER), down=None)(
    lambda m, x: F.linear(swiglu(m, x), m.q.to(x.dtype))
)
ffn_case(
    "int8_dequantized", NO_MLP, **UNGATED | {"up": integers(INNER, DIM), "scale": vector(INNER, 1)}
)(lambda m, x: m.down(F.gelu(F.linear(x, m.up.to(x.dtype) * m.scale))))
ffn_case(
    "weight_norm",
    NO_MLP,
    down=lambda: nn.utils.parametrizations.weight_norm(nn.Linear(INNER, DIM)),
)(lambda m, x: m.down(swiglu(m, x)))
ffn_case("weight_written_before_use", ANY)(
    lambda m, x: (h := swiglu(m, x), m.down.weight.data.mul_(2.0), m.down(h))[-1]
)
ffn_case(
    "weights_are_buffers", NO_MLP, **NO_LINEARS | {"u": buffer(INNER, DIM), "d": buffer(DIM, INNER)}
)(lambda m, x: F.linear(F.gelu(F.linear(x, m.u)), m.d))
GLOBAL = [weight(DIM, INNER)(), weight(INNER, DIM)()]
ffn_case("parameters_of_no_module", ANY, **NO_LINEARS)(
    lambda m, x: F.gelu(x @ GLOBAL[0]) @ GLOBAL[1]
)
ffn_case("matmul_of_in_by_out", **MATRICES)(lambda m, x: torch.matmul(F.gelu(x @ m.u), m.d))
ffn_case("addmm", **MATRICES, b=vector(INNER), c=vector(DIM))(
    lambda m, x: torch.addmm(m.c, F.gelu(torch.addmm(m.b, x.view(-1, DIM), m.u)), m.d).view_as(x)
)
ffn_case("matmul_over_tokens", NO_MLP, **NO_LINEARS | dict.fromkeys("ud", weight(TOKENS, TOKENS)))(
    lambda m, x: m.d @ F.gelu(m.u @ x)
)
ffn_case("mixer_over_tokens", ANY, up=linear(TOKENS, 28), down=linear(28, TOKENS), **UNGATED)(
    lambda m, x: m.down(F.gelu(m.up(x.transpose(1, 2)))).transpose(1, 2)
)


# Low rank.

LOW = {"a": linear(DIM, 4), "b": linear(4, DIM)}

ffn_case("lora_of_gate", a=linear(DIM, 4), b=linear(4, INNER))(
    lambda m, x: m.down(F.silu(m.gate(x) + 2.0 * m.b(m.a(x))) * m.up(x))
)
ffn_case("lora_of_down", a=linear(INNER, 4), b=linear(4, DIM))(
    lambda m, x: m.down(h := swiglu(m, x)) + m.b(m.a(h))
)
ffn_case("low_rank_beside", std(mlp=("layers.*.ffn.*",)), **LOW)(
    lambda m, x: m.down(swiglu(m, x)) + m.b(m.a(x) * 0.5)
)
ffn_case("adapter_after", **LOW)(lambda m, x: (y := m.down(swiglu(m, x))) + m.b(F.relu(m.a(y))))
ffn_case("two_downs_in_a_row", **UNGATED, middle=linear(INNER, DIM), down=linear(DIM, DIM))(
    lambda m, x: m.down(F.gelu(m.middle(F.gelu(m.up(x)))))
)
ffn_case("three_ups", NO_MLP, third=linear(DIM, INNER))(
    lambda m, x: m.down(swiglu(m, x) + m.third(x))
)

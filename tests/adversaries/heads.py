"""Projections that score: heads, classifiers, routers of experts, and MLPs beside the decoder."""

import torch
import torch.nn.functional as F
from torch import Tensor

from adversaries.common import (
    ANY,
    DIM,
    FFN,
    INNER,
    NO_HEAD,
    NO_MLP,
    VOCAB,
    Block,
    Case,
    ffn,
    hidden,
    ids,
    layer,
    linear,
    registry,
    stack,
    std,
    table,
    weight,
)

CASES: dict[str, Case] = {}
case = registry(CASES)
expert_case = registry(
    CASES, "ffn", **dict.fromkeys(FFN), router=linear(DIM, 2), experts=stack(2, ffn)
)

STAGE = {"emb": None}  # a pipeline stage that is given hidden states
BARE = dict.fromkeys(("emb", "layers", "norm", "head"))


# Heads.


case("classifier", NO_HEAD, head=linear(DIM, 3))(lambda m, i: m.logits(i))
case("more_labels_than_features", NO_HEAD, head=linear(DIM, 77))(lambda m, i: m.logits(i))
case("vocabulary_below_hidden", args=lambda: (ids(vocab=16),), emb=table(16), head=linear(DIM, 16))(
    lambda m, i: m.logits(i)
)
case(
    "small_head_of_a_last_stage",
    std(embedding=(), lmhead=()),
    args=lambda: (hidden(),),
    head=linear(DIM, 16),
    **STAGE,
)(lambda m, x: m.head(m.encode(x)))
case("as_wide_as_the_positions", NO_HEAD, head=linear(DIM, 128), positions=table(128))(
    lambda m, i: m.head(m.encode(m.emb(i) + m.positions(torch.arange(i.shape[1]))))
)
case(
    "as_wide_as_the_segments",
    NO_HEAD,
    args=lambda: (ids(), torch.zeros_like(ids())),
    head=linear(DIM, 2),
    segments=table(2),
)(lambda m, i, s: m.head(m.encode(m.emb(i) + m.segments(s))[:, 0]))


@case("chosen_token_looked_up_again")
def _(m: Block, i: Tensor) -> tuple[Tensor, Tensor]:
    logits = m.logits(i)
    return logits, m.head(m.norm(m.emb(logits[:, -1:].argmax(-1))))


@case("input_overwritten_after_head")
def _(m: Block, i: Tensor) -> Tensor:
    x = m.encode(m.emb(i))
    logits = m.head(x)
    x.zero_()
    return logits


MTP = std(
    lmhead=("head.*", "head2.*"),
    oproj=("layers.*.attn.o.*", "next.attn.o.*"),
    mlp=("layers.*.ffn.*", "next.ffn.*"),
)


@case(
    "multi_token_prediction", MTP, join=linear(2 * DIM, DIM), next=layer, head2=linear(DIM, VOCAB)
)
def _(m: Block, i: Tensor) -> tuple[Tensor, Tensor]:
    e = m.emb(i)
    x = m.layers[0](e)
    return m.head(m.norm(x)), m.head2(m.norm(m.next(m.join(torch.cat([x, e], -1)))))


@case(
    "medusa",
    std(lmhead=("head.*", "heads.*")),
    shifts=stack(2, linear(DIM, DIM)),
    heads=stack(2, linear(DIM, VOCAB)),
)
def _(m: Block, i: Tensor) -> list[Tensor]:
    x = m.encode(m.emb(i))
    pairs = zip(m.shifts, m.heads, strict=True)
    return [m.head(x), *(head(x + F.silu(shift(x))) for shift, head in pairs)]


@case(
    "codebooks",
    std(embedding=("tables.*",), lmhead=("heads.*",)),
    args=lambda: (torch.stack([ids()] * 4, 1),),
    tables=stack(4, table(VOCAB)),
    heads=stack(4, linear(DIM, VOCAB)),
    emb=None,
    head=None,
)
def _(m: Block, i: Tensor) -> Tensor:
    x = m.encode(sum(one(i[:, j]) for j, one in enumerate(m.tables)))
    return torch.stack([head(x) for head in m.heads], 1)


# Projections that are no head of a decoder.


def alone(name: str, **parts: object) -> object:
    """A model that is nothing but these parts, given hidden states."""
    return case(name, {"mlp": ("block.*",)}, args=lambda: (hidden(),), **BARE | parts)


alone("ffn_alone", block=ffn)(lambda m, x: m.block(x))
alone("wide_projection_alone", project=linear(DIM, 2 * DIM))(lambda m, x: m.project(x))
alone("projector_to_another_width", a=linear(DIM, 64, True), b=linear(64, 64, True))(
    lambda m, x: m.b(F.gelu(m.a(x)))
)
case(
    "weight_is_an_argument", std(lmhead=()), args=lambda: (ids(), torch.ones(VOCAB, DIM)), head=None
)(lambda m, i, w: F.linear(m.encode(m.emb(i)), w))
case(
    "mlp_of_a_vector_per_sequence",
    std(mlp=("layers.*.ffn.*", "time?.*")),
    args=lambda: (ids(), torch.ones(2, DIM)),
    time1=linear(DIM, INNER),
    time2=linear(INNER, DIM),
)(lambda m, i, t: m.head(m.encode(m.emb(i) + m.time2(F.silu(m.time1(t)))[:, None])))


# Routers: the experts of a token are picked by data, so no expert is an FFN that all ranks share.


def mixed(m: Block, x: Tensor, p: Tensor, e: Tensor) -> Tensor:
    """Every expert on all tokens, zeroed where it was not picked."""
    return sum((p * (e == j)).sum(-1, keepdim=True) * one(x) for j, one in enumerate(m.experts))


expert_case("top_k_router", NO_MLP)(lambda m, x: mixed(m, x, *m.router(x).topk(1, -1)))
expert_case("max_router", NO_MLP)(
    lambda m, x: mixed(m, x, *m.router(x).softmax(-1).max(-1, keepdim=True))
)
expert_case("router_of_another_norm", NO_MLP)(
    lambda m, x: mixed(m, x, *m.router(F.layer_norm(x, (DIM,))).topk(1, -1))
)
expert_case("router_by_einsum", NO_MLP)(
    lambda m, x: mixed(m, x, *torch.einsum("bsd,ed->bse", x, m.router.weight).topk(1, -1))
)
expert_case("mlp_router", NO_MLP, before=linear(DIM, DIM))(
    lambda m, x: mixed(m, x, *m.router(F.gelu(m.before(x))).topk(1, -1))
)
expert_case("relu_router", ANY)(
    lambda m, x: sum(F.relu(m.router(x))[..., j, None] * e(x) for j, e in enumerate(m.experts))
)
expert_case("softmax_of_all_experts")(
    lambda m, x: sum(m.router(x).softmax(-1)[..., j, None] * e(x) for j, e in enumerate(m.experts))
)
expert_case("shared_expert_with_a_gate", router=linear(DIM, 1), experts=stack(1, ffn))(
    lambda m, x: torch.sigmoid(m.router(x)) * m.experts[0](x)
)


@expert_case("tokens_gathered_by_expert", std(oproj=("*attn.o.*",), mlp=()))
def _(m: Block, x: Tensor) -> Tensor:
    """Breaks the graph: how many tokens an expert gets is data."""
    f = x.reshape(-1, DIM)
    p, e = m.router(f).topk(1, -1)
    y = torch.zeros_like(f)
    for j, one in enumerate(m.experts):
        t = torch.where(e[:, 0] == j)[0]
        y = y.index_add(0, t, one(f[t]) * p[t])
    return y.view_as(x)


@expert_case("mixture_of_depths", NO_MLP, router=linear(DIM, 1), experts=stack(1, ffn))
def _(m: Block, x: Tensor) -> Tensor:
    """The router picks tokens."""
    w, t = m.router(x).squeeze(-1).topk(3, -1)
    t = t[..., None].expand(-1, -1, DIM)
    y = m.experts[0](x.gather(1, t)) * w[..., None].sigmoid()
    return torch.zeros_like(x).scatter(1, t, y)


@case("router_logits_returned", router=linear(DIM, 4), experts=weight(4, DIM, DIM), shared=ffn)
def _(m: Block, i: Tensor) -> tuple[Tensor, Tensor]:
    """A router is no head, though its logits leave the graph."""
    x = m.encode(m.emb(i))
    logits = m.router(x)
    p, e = logits.softmax(-1).topk(1, -1)
    y = p * (x.unsqueeze(-2) @ m.experts[e.squeeze(-1)]).squeeze(-2)
    return m.head(m.norm(x + y)), logits


@case("hash_router", experts=weight(4, DIM, DIM))
def _(m: Block, i: Tensor) -> Tensor:
    """The token id picks the expert, as if it were a row of a table."""
    x = m.encode(m.emb(i))
    return m.head(x + (x.unsqueeze(-2) @ m.experts[i % 4]).squeeze(-2))


@case("hash_mask", std(mlp=("layers.*.ffn.*", "experts.*")), experts=stack(2, ffn))
def _(m: Block, i: Tensor) -> Tensor:
    """All experts run on all tokens, so they may be cut; the token id picks among the results."""
    x = m.encode(m.emb(i))
    return m.head(x + mixed(m, x, torch.ones(1), (i % 2).unsqueeze(-1)))

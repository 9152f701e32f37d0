"""Which weights of odd graphs are shared experts, attention's projections and adapters."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zoo
from decoding import sizes
from marks import quick
from torch import Tensor, nn

import fgtp_pass

pytestmark = quick
DIM, EXPERTS = 32, 3
SIX = (*zoo.COMPONENTS, *zoo.OPT_IN)


def linear(rows: int, columns: int) -> nn.Linear:
    return nn.Linear(rows, columns, bias=False)


class FFN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = linear(DIM, 48), linear(DIM, 48), linear(48, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (linear(DIM, DIM) for _ in range(4))

    def core(self, *qkv: Tensor) -> Tensor:
        heads = (x.unflatten(-1, (2, -1)).transpose(1, 2) for x in qkv)
        return F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.core(self.q(x), self.k(x), self.v(x)))


class Model(nn.Module):
    """ids -> a table -> norm -> the body -> lm_head."""

    def __init__(self, body: Callable[[Any, Tensor], Tensor], **parts: nn.Module):
        super().__init__()
        self.table, self.head, self.norm = nn.Embedding(80, DIM), linear(DIM, 80), nn.RMSNorm(DIM)
        for name, part in parts.items():
            setattr(self, name, part)
        self.body = body

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        return self.head(x + self.body(self, self.norm(x)))


def cut(model: nn.Module) -> dict[str, set[str]]:
    """By component, the weights that are cut with all six on; without table and head."""
    plan = fgtp_pass.make_plan(
        model.eval(),
        args=(torch.zeros(2, 5, dtype=torch.long),),
        data_parallel_size=2,
        finegrained_tp_config=sizes(**dict.fromkeys(SIX, 2)),
        allow_missing=SIX,
    )
    found: dict[str, set[str]] = {}
    for site in plan.sites:
        if site.component not in ("embedding", "lmhead"):
            names = {weight.fqn.removesuffix(".weight") for weight in site.weights}
            found.setdefault(site.component, set()).update(names)
    return found


def of(part: str, *names: str) -> set[str]:
    return {f"{part}.{name}" for name in names}


SHARED = of("shared", "gate", "up", "down")
Experts = Callable[[Any, Tensor, Tensor, Tensor], Tensor]  # model, x, weights, the chosen one

ROUTED: dict[str, Experts] = {
    "weighted": lambda m, x, w, i: sum(e(x) * w[..., j : j + 1] for j, e in enumerate(m.experts)),
    "weighted behind a cast": lambda m, x, w, i: sum(
        (e(x).double() * w[..., j : j + 1]).float() for j, e in enumerate(m.experts)
    ),
    "weighted behind a scale": lambda m, x, w, i: sum(
        (e(x) * 2.5) * w[..., j : j + 1] for j, e in enumerate(m.experts)
    ),
    "stacked, in an einsum": lambda m, x, w, i: torch.einsum(
        "btne,btn->bte", torch.stack([e(x) for e in m.experts], -2), w
    ),
    "stacked, in a matmul": lambda m, x, w, i: (
        w.unsqueeze(-2) @ torch.stack([e(x) for e in m.experts], -2)
    ).squeeze(-2),
    "masked by where": lambda m, x, w, i: sum(
        torch.where(i == j, e(x), 0.0) for j, e in enumerate(m.experts)
    ),
    "masked by a fill": lambda m, x, w, i: sum(
        e(x).masked_fill(i != j, 0.0) for j, e in enumerate(m.experts)
    ),
    "inputs weighted": lambda m, x, w, i: sum(
        e(x * w[..., j : j + 1]) for j, e in enumerate(m.experts)
    ),
}


@pytest.mark.parametrize("name", list(ROUTED))
def test_only_the_shared_expert_is_cut(name: str) -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        value, index = m.router(x).softmax(-1).topk(1)
        weights = torch.zeros(*x.shape[:-1], EXPERTS).scatter(-1, index, value)
        return ROUTED[name](m, x, weights, index) + m.shared(x)

    experts = nn.ModuleList(FFN() for _ in range(EXPERTS))
    model = Model(body, router=linear(DIM, EXPERTS), experts=experts, shared=FFN())
    assert cut(model) == {"sharedexpert": SHARED}


def test_two_shared_experts() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        value, _ = m.router(x).softmax(-1).topk(1)
        return m.shared(x) + m.gate(x).sigmoid() * m.more(x) + value

    model = Model(body, router=linear(DIM, EXPERTS), shared=FFN(), more=FFN(), gate=linear(DIM, 1))
    assert cut(model) == {"sharedexpert": SHARED | of("more", "gate", "up", "down")}


def test_attention_to_the_best_positions_is_no_router() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        scores = m.attn.q(x) @ m.attn.k(x).mT
        worst = scores.topk(3, -1).values[..., -1:]
        core = scores.masked_fill(scores < worst, -1e9).softmax(-1) @ m.attn.v(x)
        return m.attn.o(core) + m.ffn(x)

    found = cut(Model(body, attn=Attention(), ffn=FFN()))
    assert found == {
        "qkv": of("attn", "q", "k", "v"),
        "oproj": of("attn", "o"),
        "mlp": of("ffn", "gate", "up", "down"),
    }


@pytest.mark.parametrize(("kernel", "mixes"), [(4, True), (1, False)])
def test_a_convolution_behind_the_residual(kernel: int, mixes: bool) -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        h = x + m.attn(x)
        return m.ffn(h + m.conv(h.mT)[..., : x.shape[1]].mT)

    conv = nn.Conv1d(DIM, DIM, kernel, groups=DIM, padding=kernel - 1)
    found = cut(Model(body, attn=Attention(), conv=conv, ffn=FFN()))
    assert found["oproj"] == of("attn", "o")
    assert found["qkv"] == of("attn", "q", "k", "v")


ADAPTED: dict[str, Callable[[Any, Tensor, str], Tensor]] = {
    "one": lambda m, x, n: (
        getattr(m.attn, n)(x) + 0.5 * getattr(m, f"{n}b")(getattr(m, f"{n}a")(x))
    ),
    "in place": lambda m, x, n: getattr(m.attn, n)(x).add_(
        getattr(m, f"{n}b")(getattr(m, f"{n}a")(x))
    ),
    "two": lambda m, x, n: (
        getattr(m.attn, n)(x)
        + getattr(m, f"{n}b")(getattr(m, f"{n}a")(x))
        + 2 * getattr(m, f"{n}d")(getattr(m, f"{n}c")(x))
    ),
    "scaled by token": lambda m, x, n: (
        getattr(m.attn, n)(x)
        + x.mean(-1, keepdim=True) * getattr(m, f"{n}b")(getattr(m, f"{n}a")(x))
    ),
}


@pytest.mark.parametrize("name", list(ADAPTED))
def test_adapters_stay_whole(name: str) -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        core = m.attn.core(ADAPTED[name](m, x, "q"), m.attn.k(x), m.attn.v(x))
        return ADAPTED[name](m, core, "o")

    pairs = {f"{n}{end}": linear(DIM, 4) for n in "qo" for end in "ac"}
    pairs |= {f"{n}{end}": linear(4, DIM) for n in "qo" for end in "bd"}
    found = cut(Model(body, attn=Attention(), **pairs))
    assert found == {"qkv": of("attn", "q", "k", "v"), "oproj": of("attn", "o")}


def test_any_number_of_models_is_planned() -> None:
    """Dynamo gives up on a piece of code that it has traced some eight times."""
    for width in range(8, 32, 2):
        model = Model(lambda m, x: m.ffn(x), ffn=FFN())
        model.table = nn.Embedding(10 * width, DIM)
        model.head = linear(DIM, 10 * width)
        assert cut(model) == {"mlp": of("ffn", "gate", "up", "down")}

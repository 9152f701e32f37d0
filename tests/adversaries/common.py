"""Building blocks of the adversaries, and the registry that each module of cases fills.

Every case is a small decoder (LM) of which one place is written differently: its attention, its
FFN, or the model as a whole. The place is a Block: named parts, and a function of the block and
its input that says what they compute. `expect` maps a component to the parameters that its sites
may hold, as patterns; all others must be left alone.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DIM, INNER, VOCAB, HEADS, BATCH, TOKENS = 32, 96, 160, 4, 2, 7
COMPONENTS = ("embedding", "lmhead", "oproj", "mlp")

Part = Callable[[], nn.Module | Tensor]
Parts = Mapping[str, Part | None]
Body = Callable[..., Any]
Expect = Mapping[str, tuple[str, ...]]
Args = Callable[[], tuple[Tensor, ...]]


def std(**changes: tuple[str, ...]) -> Expect:
    """What a plain LM may shard, with changes by component."""
    plain = {"embedding": ("emb.weight",), "lmhead": ("head.*",)}
    return plain | {"oproj": ("layers.*.attn.o.*",), "mlp": ("layers.*.ffn.*",)} | changes


STD = std()
NO_MLP = std(mlp=())
NO_OPROJ = std(oproj=())
NO_EMBEDDING = std(embedding=())
NO_HEAD = std(lmhead=())
ANY = dict.fromkeys(COMPONENTS, ("*",))  # no claim; numbers must still be right
# Across a graph break, Dynamo names parameters relative to the frame that it compiles.
BROKEN = std(
    oproj=("*attn.o.*", "o.*"), mlp=("*ffn.*", *(f"{part}.*" for part in ("gate", "up", "down")))
)


# Parts: functions that make one, as every layer needs its own.


def linear(inputs: int, outputs: int, bias: bool = False) -> Part:
    return lambda: nn.Linear(inputs, outputs, bias=bias)


def table(rows: int, width: int = DIM, **options: Any) -> Part:
    return lambda: nn.Embedding(rows, width, **options)


def layernorm(width: int = DIM) -> Part:
    return lambda: nn.LayerNorm(width)


def weight(*shape: int) -> Part:
    return lambda: nn.Parameter(torch.randn(shape) / 6)


def vector(*shape: int) -> Part:
    return lambda: nn.Parameter(torch.rand(shape))


def buffer(*shape: int) -> Part:
    return lambda: torch.rand(shape)


def stack(number: int, part: Part) -> Part:
    return lambda: nn.ModuleList(part() for _ in range(number))


class Block(nn.Module):
    """Parts by name, and what they compute. A part that is a plain tensor becomes a buffer."""

    def __init__(self, parts: Parts, body: Body):
        super().__init__()
        for name, make in parts.items():
            if make is None:
                continue
            part = make()
            if isinstance(part, nn.Module | nn.Parameter):
                setattr(self, name, part)
            else:
                self.register_buffer(name, part)
        self.body = body

    def forward(self, *args: Tensor) -> Any:
        return self.body(self, *args)


# Attention.


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


def core(m: Any, x: Tensor) -> Tensor:
    return sdpa(m.q(x), m.k(x), m.v(x))


def plain_attention(m: Any, x: Tensor) -> Tensor:
    return m.o(core(m, x))


ATTENTION: Parts = dict.fromkeys("qkvo", linear(DIM, DIM))


def attention() -> Block:
    return Block(ATTENTION, plain_attention)


# FFN.


def swiglu(m: Any, x: Tensor) -> Tensor:
    return F.silu(m.gate(x)) * m.up(x)


def plain_ffn(m: Any, x: Tensor) -> Tensor:
    return m.down(swiglu(m, x))


FFN: Parts = {
    "gate": linear(DIM, INNER),
    "up": linear(DIM, INNER),
    "down": linear(INNER, DIM),
}
UNGATED: Parts = {"gate": None}
FUSED: Parts = {"gate": None, "up": None, "both": linear(DIM, 2 * INNER, bias=True)}


def ffn() -> Block:
    return Block(FFN, plain_ffn)


# Layers and models.


def residual_layer(m: Any, x: Tensor) -> Tensor:
    x = x + m.attn(m.n1(x))
    return x + m.ffn(m.n2(x))


def chained_layer(m: Any, x: Tensor) -> Tensor:
    """No residual stream: nothing but the layer's own result goes on."""
    return m.ffn(m.n2(m.attn(m.n1(x))))


def layer(attn: Part = attention, ffn: Part = ffn, body: Body = residual_layer) -> Block:
    return Block({"n1": layernorm(), "n2": layernorm(), "attn": attn, "ffn": ffn}, body)


class LM(Block):
    def encode(self, x: Tensor) -> Tensor:
        for one in self.layers:
            x = one(x)
        return self.norm(x)

    def logits(self, ids: Tensor) -> Tensor:
        return self.head(self.encode(self.emb(ids)))


MODEL: Parts = {
    "emb": table(VOCAB),
    "layers": stack(2, layer),
    "norm": layernorm(),
    "head": linear(DIM, VOCAB),
}
ONE_LAYER: Parts = {"layers": stack(1, layer)}


def ids(tokens: int = TOKENS, vocab: int = VOCAB) -> Tensor:
    return torch.randint(vocab, (BATCH, tokens), generator=torch.Generator().manual_seed(1))


def hidden() -> Tensor:
    return torch.randn(BATCH, TOKENS, DIM, generator=torch.Generator().manual_seed(2))


def positions() -> Tensor:
    return torch.arange(TOKENS)[None]


@dataclass(frozen=True)
class Case:
    make: Callable[[], nn.Module]
    expect: Expect
    args: Args

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return self.make().eval()

    def allows(self, component: str, fqn: str) -> bool:
        return any(fnmatchcase(fqn, pattern) for pattern in self.expect.get(component, ()))


def registry(
    cases: dict[str, Case], place: str = "model", **defaults: Part | None
) -> Callable[..., Callable[[Body], Body]]:
    """A decorator that adds a case: a function for the model, its "attn" or its "ffn"."""
    standard = {"model": MODEL, "attn": ATTENTION, "ffn": FFN}[place]

    def case(
        name: str,
        expect: Expect = STD,
        *,
        args: Args = lambda: (ids(),),
        layer_body: Body = residual_layer,
        **parts: Part | None,
    ) -> Callable[[Body], Body]:
        def add(body: Body) -> Body:
            assert name not in cases, f"two cases are called {name}"

            def make() -> nn.Module:
                chosen = {**standard, **defaults, **parts}
                if place == "model":
                    return LM(chosen, body)
                places: Any = {place: lambda: Block(chosen, body)}
                layers = stack(2, lambda: layer(**places, body=layer_body))
                return LM({**MODEL, "layers": layers}, LM.logits)

            cases[name] = Case(make, expect, args)
            return body

        return add

    return case

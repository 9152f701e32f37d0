"""What a decoder may be made of: frozen data, from which `source.py` writes a module.

The first value of every field is the plainest, and hypothesis shrinks towards it, so what is left
of a failing program is what matters.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

HIDDEN, VOCABULARY, HEADS, QUERY = 16, 50, 2, 8

Spelling = Literal[
    "module", "linear", "x @ W.T", "x @ W", "matmul of t()", "addmm", "einsum", "cast",
    "contiguous", "flat",
]  # fmt: skip
# How an activation is handed on. The last four lose values, the others do not.
Copy = Literal[
    "itself", "view", "clone", "detach", "slice", "dropout off", "double", "plus 0",
    "bfloat16", "float16", "float8", "int8",
]  # fmt: skip
LOSSY = ("bfloat16", "float16", "float8", "int8")
# What is written in place, at some place between other ops.
Write = Literal[
    "nothing", "buffer", "buffer through a view", "buffer by out", "buffer by an item",
    "buffer by foreach", "buffer by a custom op", "running maximum", "vector", "rebind",
    "input", "input through a view", "input by an item", "stream", "inner",
]  # fmt: skip
# What an activation is multiplied with.
Operand = Literal["nothing", "buffer", "element", "vector", "parameter", "scalar parameter"]
Activation = Literal["relu", "silu", "gelu", "tanh in place", "clamp", "square", "swish by hand"]


@dataclass(frozen=True)
class Matmul:
    """A projection. shared: with an earlier weight of its shape, if the model has one."""

    spelling: Spelling = "module"
    bias: bool = False
    shared: bool = False


@dataclass(frozen=True)
class Ffn:
    """up (and gate) -> an activation and an operand -> down, with writes between."""

    gate: Literal["none", "separate", "fused"] = "none"
    width: Literal[24, 25, 36] = 24
    up: Matmul = Matmul()
    down: Matmul = Matmul()
    gate_reads: Copy = "itself"
    up_reads: Copy = "itself"
    down_reads: Copy = "itself"
    activation: Activation = "relu"
    operand: Operand = "nothing"
    layout: Literal["shaped", "flat", "flat inside", "heads inside"] = "shaped"
    before_gate: Write = "nothing"
    before_up: Write = "nothing"
    before_activation: Write = "nothing"
    before_down: Write = "nothing"
    after_down: Write = "nothing"


@dataclass(frozen=True)
class Attention:
    """q, k, v -> a core -> an op -> o, with writes between."""

    core: Literal["sdpa", "softmax", "bmm"] = "sdpa"
    qkv: Literal["separate", "fused", "grouped"] = "separate"
    head: Literal[8, 4, 12] = 8
    o: Matmul = Matmul()
    o_reads: Copy = "itself"
    before_o: Literal["nothing", "gate", "norm", "clamp"] = "nothing"
    operand: Operand = "nothing"
    before_core: Write = "nothing"
    before_matmul: Write = "nothing"
    after_o: Write = "nothing"


@dataclass(frozen=True)
class Layer:
    """Attention and FFN around one residual stream, then perhaps other tokens."""

    attention: Attention | None = Attention()
    ffn: Ffn | None = Ffn()
    norm: Literal["layer", "rms", "none"] = "layer"
    place: Literal["before", "after", "both"] = "before"
    blocks: Literal["sequential", "parallel", "ffn first"] = "sequential"
    residual: Literal["add", "in place", "scaled", "none"] = "add"
    times: Literal[1, 2] = 1
    tokens: Literal[
        "same", "every other", "first half", "mean of pairs", "pool", "third", "last",
        "last kept", "without the first", "twice", "of a mask",
    ] = "same"  # fmt: skip


@dataclass(frozen=True)
class Embedding:
    lookup: Literal["module", "embedding", "index", "index_select", "one hot", "padding"] = "module"
    ids: Literal["as given", "int32", "clamped", "shifted", "view", "masked"] = "as given"
    ids_written: Literal["never", "before", "after"] = "never"
    positions: Literal["none", "learned", "counted", "sinusoidal"] = "none"
    operand: Operand = "nothing"
    write: Write = "nothing"


@dataclass(frozen=True)
class Head:
    matmul: Matmul = Matmul()
    reads: Literal["all", "last", "last kept", "first half"] = "all"
    tied: bool = False
    after: Literal["nothing", "scale", "softcap", "float32", "in place", "argmax"] = "nothing"
    operand: Operand = "nothing"
    before: Write = "nothing"


@dataclass(frozen=True)
class Program:
    """A decoder. extra: what it returns beside its logits, some of it by way of `second`."""

    embedding: Embedding = Embedding()
    layers: tuple[Layer, ...] = (Layer(),)
    head: Head = Head()
    extra: Literal["nothing", "hidden", "second head", "multi-token head", "probabilities"] = (
        "nothing"
    )
    second: Head = Head()
    single: bool = False

    @property
    def dtype(self) -> str:
        """In float64 errors stand out; a cast that loses values would make float32's into large
        ones."""
        return "float32" if self.single and not set(LOSSY) & set(_leaves(self)) else "float64"


Shape = tuple[int, int]  # (batch, tokens)


@dataclass(frozen=True)
class Case:
    """A program, and how ranks call it.

    calls: by call, the shapes by rank; None idles. "equal": every rank comes with rank 0's. The
    first call is nobody's idle step. six: with the opt-in components on.
    """

    program: Program = Program()
    ranks: Literal[2, 3] = 2
    contract: Literal["equal", "ragged"] = "equal"
    dynamic: Literal[None, True, False] = None
    inner: Literal["eager", "aot_eager"] = "eager"
    calls: tuple[tuple[Shape | None, Shape | None, Shape | None], ...] = (((2, 6),) * 3,)
    six: bool = False

    def shape(self, call: int, rank: int) -> Shape | None:
        shapes = self.calls[call][: self.ranks]
        if self.contract == "equal":
            common = next((s for s in shapes if s is not None), (2, 6))
            return common if shapes[rank] is not None or call == 0 else None
        return shapes[rank] or (None if call else (2, 6))


def _leaves(value: Any) -> Iterator[Any]:
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _leaves(getattr(value, field.name))
    elif isinstance(value, tuple):
        for item in value:
            yield from _leaves(item)
    else:
        yield value

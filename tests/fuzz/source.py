"""A program as the code of an nn.Module, which is how it is read, and how it runs."""

import itertools
import linecache
from collections import defaultdict
from typing import Any

import torch
from fuzz.grammar import (
    HEADS,
    HIDDEN,
    QUERY,
    VOCABULARY,
    Attention,
    Copy,
    Ffn,
    Head,
    Layer,
    Matmul,
    Operand,
    Program,
    Write,
)
from torch import nn

COPIES: dict[Copy, str] = {
    "itself": "{0}",
    "view": "{0}.reshape({0}.shape)",
    "clone": "{0}.clone()",
    "detach": "{0}.detach()",
    "slice": "{0}[..., :]",
    "dropout off": "F.dropout({0}, 0.5, training=False)",
    "double": "{0}.double().to({0}.dtype)",
    "plus 0": "({0} + 0)",
    "bfloat16": "{0}.bfloat16().to({0}.dtype)",
    "float16": "{0}.half().to({0}.dtype)",
    "float8": "{0}.to(torch.float8_e4m3fn).to({0}.dtype)",
    "int8": "{0}.to(torch.int8).to({0}.dtype)",
}
ACTIVATIONS = {
    "relu": "F.relu({0})",
    "silu": "F.silu({0})",
    "gelu": "F.gelu({0})",
    "tanh in place": "{0}.tanh_()",
    "clamp": "{0}.clamp(-0.5, 2)",
    "square": "F.relu({0}).square()",
    "swish by hand": "{0} * torch.sigmoid({0})",
}
# Buffers go from 1 to 1.5 and back, so that they stay in bounds over any number of writes.
WRITES: dict[Write, str] = {
    "nothing": "",
    "buffer": "self.amount.neg_().add_(2.5)",
    "buffer through a view": "self.memory.view(2, 2).neg_().add_(2.5)",
    "buffer by out": "torch.sub(2.5, self.amount, out=self.amount)",
    "buffer by an item": "self.memory[3] = 2.5 - self.memory[3]",
    "buffer by foreach": "torch._foreach_mul_([self.memory], 1.01)",
    "buffer by a custom op": "torch.ops.fgtp_fuzz.change(self.memory)",
    "running maximum": "self.memory.copy_(self.memory.maximum({h}.abs().amax()))",
    "vector": "self.vector{width}.neg_().add_(2.5)",
    "rebind": "self.amount = 2.5 - self.amount",
    "input": "{h}.mul_(0.5)",
    "input through a view": "{h}.view(-1, {h}.shape[-1])[:1].mul_(0.5)",
    "input by an item": "{h}[..., 0] = 0.5",
    "stream": "x.add_(0.25)",
    "inner": "{y}.mul_(0.5)",
}
OPERANDS: dict[Operand, str] = {
    "nothing": "",
    "buffer": " / self.amount",
    "element": " * self.memory[3]",
    "vector": " * self.vector{width}",
    "parameter": " * self.gain{width}",
    "scalar parameter": " * self.gain",
}
TOKENS = {
    "same": "",
    "every other": "x[:, ::2]",
    "first half": "x[:, : (x.shape[1] + 1) // 2]",
    "mean of pairs": "x[:, : x.shape[1] // 2 * 2].unflatten(1, (-1, 2)).mean(2)",
    "pool": "F.avg_pool1d(x.transpose(1, 2), 2).transpose(1, 2)",
    "third": "x[:, : max(x.shape[1] // 3, 1)]",
    "last": "x[:, -1]",
    "last kept": "x[:, -1:]",
    "without the first": "x[:, 1:]",
    "twice": "torch.cat([x, x], 1)",
    "of a mask": "x[x[..., 0] > 0]",
}
IDS = {
    "as given": "ids",
    "int32": "ids.int()",
    "clamped": f"ids.clamp(0, {VOCABULARY - 1})",
    "shifted": f"(ids + 1) % {VOCABULARY}",
    "view": "ids.view(ids.shape)",
    "masked": "ids.masked_fill(ids == 3, 0)",
}
LOOKUPS = {
    "module": "self.table({ids})",
    "padding": "self.table({ids})",
    "embedding": "F.embedding({ids}, self.table.weight)",
    "index": "self.table.weight[{ids}]",
    "index_select": "self.table.weight.index_select(0, {ids}.flatten())"
    f".view(*ids.shape, {HIDDEN})",
    "one hot": f"F.one_hot({{ids}}.long(), {VOCABULARY}).to(self.table.weight) @ self.table.weight",
}
HEAD_READS = {
    "all": "x",
    "last": "x[:, -1]",
    "last kept": "x[:, -1:]",
    "first half": "x[:, : (x.shape[1] + 1) // 2]",
}
HEAD_AFTER = {
    "nothing": "{0}",
    "scale": "{0} * 0.25",
    "softcap": "torch.tanh({0} / 5) * 5",
    "float32": "{0}.float()",
    "in place": "{0}.div_(2).neg_()",
    "argmax": "{0}.argmax(-1)",
}

_library = torch.library.Library("fgtp_fuzz", "DEF")
_library.define("change(Tensor(a!) x) -> ()")
_library.impl("change", lambda x: x.neg_().add_(2.5) and None, "CompositeExplicitAutograd")
torch.library.register_fake("fgtp_fuzz::change", lambda x: None, lib=_library)

_numbers = itertools.count()


def build(program: Program) -> nn.Module:
    """The module of a program; equal programs have equal weights."""
    code, file = source(program), f"fuzzed_{next(_numbers)}.py"
    linecache.cache[file] = (len(code), None, code.splitlines(keepends=True), file)
    names: dict[str, Any] = {}
    exec(compile(code, file, "exec"), names)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, program.dtype))
    torch.manual_seed(0)
    try:
        return names["Decoder"]().eval()
    finally:
        torch.set_default_dtype(before)


def source(program: Program) -> str:
    """The program as Python."""
    writer = _Writer(program)
    writer.program()
    init = "\n".join(" " * 8 + line for line in [*writer.buffers(), *writer.init])
    body = "\n".join(" " * 8 + line for line in writer.body)
    return (
        "import torch\nimport torch.nn.functional as F\nfrom torch import nn\n\n\n"
        "class Decoder(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        f"{init}\n\n    def forward(self, ids):\n{body}\n"
    )


class _Writer:
    def __init__(self, program: Program):
        self._program = program
        self.init: list[str] = []
        self.body: list[str] = []
        self._names: dict[str, itertools.count[int]] = defaultdict(itertools.count)
        self._weights: dict[tuple[int, int], str] = {}  # by shape, the first weight of it
        self._flat = False  # the stream has lost its batch dim

    # statements -------------------------------------------------------------------------------

    def _name(self, stem: str) -> str:
        number = next(self._names[stem])
        return f"{stem}{number}" if number else stem

    def _write(self, write: Write, h: str = "x", y: str = "x", width: int = HIDDEN) -> None:
        if write != "nothing":
            self.body.append(WRITES[write].format(h=h, y=y, width=width))

    def _operand(self, operand: Operand, width: int) -> str:
        return OPERANDS[operand].format(width=width)

    def buffers(self) -> list[str]:
        """What the body reads of buffers and gains."""
        body = "\n".join(self.body)
        lines = []
        if "self.memory" in body or "self.amount" in body:
            lines += ['self.register_buffer("memory", torch.ones(4))']
            lines += ['self.register_buffer("amount", self.memory[3])']
        for width in sorted({HIDDEN, 24, 25, 36, 4 * HEADS, 12 * HEADS, VOCABULARY}):
            if f"self.vector{width}" in body:
                lines.append(f'self.register_buffer("vector{width}", torch.ones({width}))')
            if f"self.gain{width}" in body:
                lines.append(f"self.gain{width} = nn.Parameter(torch.rand({width}))")
        if any(f"self.gain{end}" in body + " " for end in (" ", "\n", ")", ",")):
            lines.append("self.gain = nn.Parameter(torch.tensor(0.75))")
        return lines

    def _matmul(self, stem: str, x: str, ins: int, outs: int, matmul: Matmul) -> str:
        """The expression of a projection, whose weight is made if it is not shared."""
        spelling = matmul.spelling
        shape = (ins, outs) if spelling in ("x @ W", "addmm") else (outs, ins)
        shared = self._weights.get(shape) if matmul.shared and spelling != "cast" else None
        name, bias = self._name(stem), ""
        if spelling == "module" and shared is None:
            self.init.append(f"self.{name} = nn.Linear({ins}, {outs}, bias={matmul.bias})")
            self._weights.setdefault(shape, f"self.{name}.weight")
            return f"self.{name}({x})"
        weight = shared or f"self.{name}"
        if shared is None:
            dtype = ""
            if spelling == "cast":
                dtype = ".bfloat16()" if self._program.dtype == "float32" else ".float()"
            value = f"torch.randn({shape[0]}, {shape[1]}){dtype} / 4"
            self.init.append(f"{weight} = nn.Parameter({value})")
            self._weights.setdefault(shape, weight)
        if matmul.bias or spelling == "addmm":
            bias = f"self.{name}_bias"
            self.init.append(f"{bias} = nn.Parameter(torch.randn({outs}))")
        added = f" + {bias}" if bias else ""
        rows = f"{x}.reshape(-1, {ins})"
        match spelling:
            case "module" | "linear":
                return f"F.linear({x}, {weight}, {bias or None})"
            case "x @ W.T":
                return f"({x} @ {weight}.T{added})"
            case "x @ W":
                return f"({x} @ {weight}{added})"
            case "matmul of t()":
                return f"(torch.matmul({x}, {weight}.t()){added})"
            case "addmm":
                return f"torch.addmm({bias}, {rows}, {weight}).view(*{x}.shape[:-1], {outs})"
            case "einsum":
                return f'(torch.einsum("...i,oi->...o", {x}, {weight}){added})'
            case "cast":
                return f"F.linear({x}, {weight}.to({x}.dtype), {bias or None})"
            case "contiguous":
                return f"F.linear({x}, {weight}.t().contiguous().t(), {bias or None})"
            case "flat":
                return f"F.linear({rows}, {weight}, {bias or None}).view(*{x}.shape[:-1], {outs})"
        raise AssertionError(spelling)

    # parts ------------------------------------------------------------------------------------

    def program(self) -> None:
        program = self._program
        self._embed()
        for layer in program.layers:
            self._layer(layer)
        head = self._head(program.head)
        self.body.append(f"logits = {head}")
        returned = ["logits"]
        if program.extra == "hidden":
            returned.append("x")
        elif program.extra == "probabilities" and program.head.after != "argmax":
            returned.append("logits.softmax(-1)")
        elif program.extra in ("second head", "multi-token head"):
            if program.extra == "multi-token head":
                self._layer(Layer(attention=None))
            self.body.append(f"more = {self._head(program.second)}")
            returned.append("more")
        self.body.append(f"return {', '.join(returned)}")

    def _embed(self) -> None:
        e = self._program.embedding
        padding = ", padding_idx=0" if e.lookup == "padding" else ""
        self.init.append(f"self.table = nn.Embedding({VOCABULARY}, {HIDDEN}{padding})")
        self._weights[VOCABULARY, HIDDEN] = "self.table.weight"
        change = f"ids.add_(1).remainder_({VOCABULARY})"
        if e.ids_written == "before":
            self.body.append(change)
        ids = IDS[e.ids]
        lookup = LOOKUPS[e.lookup].format(ids=f"({ids})" if " " in ids else ids)
        self.body.append(f"x = {lookup}{self._operand(e.operand, HIDDEN)}")
        if e.ids_written == "after":
            self.body.append(change)
        self._write(e.write)
        if e.positions in ("learned", "counted"):
            self.init.append(f"self.positions = nn.Embedding(64, {HIDDEN})")
        if e.positions == "learned":
            self.body.append("x = x + self.positions(torch.arange(ids.shape[1]))")
        elif e.positions == "counted":
            self.body.append("x = x + self.positions(ids.ne(0).long().cumsum(-1))")
        elif e.positions == "sinusoidal":
            self.body.append("x = x + torch.arange(ids.shape[1]).to(x)[:, None].sin()")

    def _layer(self, layer: Layer) -> None:
        start = len(self.body)
        parts = []
        if layer.attention is not None and not self._flat:
            parts.append(("a", self._attention, layer.attention))
        if layer.ffn is not None:
            parts.append(("d", self._ffn, layer.ffn))
        if layer.blocks == "ffn first":
            parts.reverse()
        parallel = layer.blocks == "parallel" and layer.place != "after"
        if parallel:
            self.body.append(f"h = {self._norm(layer, 'x')}")
        for result, write, part in parts:
            before = layer.place != "after" and not parallel
            if not parallel:
                self.body.append(f"h = {self._norm(layer, 'x') if before else 'x'}")
            write(part)  # type: ignore[operator]
            if layer.place == "both":
                self.body.append(f"{result} = {self._norm(layer, result)}")
            if not parallel:
                self._residual(layer, result)
        if parallel:
            self._residual(layer, " + ".join(result for result, _, _ in parts) or "h")
        if layer.times > 1 and parts:
            loop = [f"for _ in range({layer.times}):"]
            self.body[start:] = loop + ["    " + line for line in self.body[start:]]
        if layer.tokens != "same" and not self._flat:
            self.body.append(f"x = {TOKENS[layer.tokens]}")
            self._flat = layer.tokens in ("last", "of a mask")

    def _residual(self, layer: Layer, result: str) -> None:
        match layer.residual:
            case "add":
                self.body.append(f"x = x + {result}")
            case "in place":
                self.body.append(f"x += {result}")
            case "scaled":
                self.body.append(f"x = x + 0.5 * ({result})")
            case "none":
                self.body.append(f"x = {result}")
        if layer.place == "after":
            self.body.append(f"x = {self._norm(layer, 'x')}")

    def _norm(self, layer: Layer, x: str) -> str:
        if layer.norm == "none":
            return x
        kind = {"layer": "LayerNorm", "rms": "RMSNorm"}[layer.norm]
        name = self._name("norm")
        self.init.append(f"self.{name} = nn.{kind}({HIDDEN})")
        return f"self.{name}({x})"

    def _attention(self, a: Attention) -> None:
        width = HEADS * a.head
        body, shaped = self.body, "unflatten(-1, ({}, -1)).transpose(1, 2)"
        self._write(a.before_core, "h", "h")
        groups = 1 if a.qkv == "grouped" else HEADS
        if a.qkv == "fused":
            widths = [HEADS * QUERY, HEADS * QUERY, width]
            fused = self._matmul("qkv", "h", HIDDEN, sum(widths), Matmul())
            body.append(f"q, k, v = {fused}.split({widths}, -1)")
        else:
            for name, size in (
                ("q", HEADS * QUERY),
                ("k", groups * QUERY),
                ("v", groups * a.head),
            ):
                body.append(f"{name} = {self._matmul(name, 'h', HIDDEN, size, Matmul())}")
        for name, heads in (("q", HEADS), ("k", groups), ("v", groups)):
            expanded = f".expand(-1, {HEADS}, -1, -1)" if heads < HEADS and name != "q" else ""
            body.append(f"{name} = {name}.{shaped.format(heads)}{expanded}")
        if a.core == "sdpa":
            core = "F.scaled_dot_product_attention(q, k, v, is_causal=True)"
        elif a.core == "softmax":
            core = f"((q @ k.transpose(-1, -2)) / {QUERY**0.5}).softmax(-1) @ v"
        else:
            body.append("q, k, v = (t.flatten(0, 1) for t in (q, k, v))")
            body.append("p = torch.bmm(q, k.transpose(-1, -2)).softmax(-1)")
            core = f"torch.bmm(p, v).unflatten(0, (-1, {HEADS}))"
        body.append(f"a = ({core}).transpose(1, 2).flatten(2){self._operand(a.operand, width)}")
        if a.before_o == "gate":
            body.append(f"a = a * torch.sigmoid({self._matmul('g', 'h', HIDDEN, width, Matmul())})")
        elif a.before_o == "norm":
            body.append("a = a * torch.rsqrt(a.square().mean(-1, keepdim=True) + 1e-6)")
        elif a.before_o == "clamp":
            body.append("a = a.clamp(-1, 1)")
        self._write(a.before_matmul, "h", "a", width)
        body.append(f"c = {COPIES[a.o_reads].format('a')}")
        body.append(f"a = {self._matmul('o', 'c', width, HIDDEN, a.o)}")
        self._write(a.after_o, "h", "c", width)

    def _ffn(self, f: Ffn) -> None:
        width, body = f.width, self.body
        inner = {24: (4, 6), 25: (5, 5), 36: (6, 6)}[width]
        if f.layout == "flat":
            body.append(f"h = h.reshape(-1, {HIDDEN})")
        self._write(f.before_gate, "h", "h", width)
        if f.gate == "separate":
            body.append(f"e = {COPIES[f.gate_reads].format('h')}")
            body.append(f"g = {self._matmul('gate', 'e', HIDDEN, width, f.up)}")
        y = "u" if f.gate == "none" else "g"
        self._write(f.before_up, "h", "g" if f.gate == "separate" else "h", width)
        outs = 2 * width if f.gate == "fused" else width
        body.append(f"e = {COPIES[f.up_reads].format('h')}")
        body.append(f"u = {self._matmul('up', 'e', HIDDEN, outs, f.up)}")
        if f.gate == "fused":
            body.append("g, u = u.chunk(2, -1)")
        if f.layout == "heads inside":
            for name in ("g", "u") if f.gate != "none" else ("u",):
                body.append(f"{name} = {name}.unflatten(-1, {inner})")
        self._write(f.before_activation, "h", y, width)
        gated = " * u" if f.gate != "none" else ""
        body.append(f"y = {ACTIVATIONS[f.activation].format(y)}{gated}")
        if f.layout == "heads inside":
            body.append("y = y.flatten(-2)")
        elif f.layout == "flat inside":
            body.append(f"y = y.reshape(-1, {width})")
        if f.operand != "nothing":
            body.append(f"y = y{self._operand(f.operand, width)}")
        body.append(f"y = {COPIES[f.down_reads].format('y')}")
        self._write(f.before_down, "h", "y", width)
        body.append(f"d = {self._matmul('down', 'y', width, HIDDEN, f.down)}")
        self._write(f.after_down, "h", "y", width)
        if f.layout in ("flat", "flat inside"):
            body.append("d = d.view(x.shape)")

    def _head(self, head: Head) -> str:
        reads = "x" if self._flat else HEAD_READS[head.reads]
        self.body.append(f"h = {reads}")
        self._write(head.before, "h", "h")
        shared = "self.table.weight"
        if head.tied:
            logits = f"F.linear(h, {shared})"
        else:
            logits = self._matmul("head", "h", HIDDEN, VOCABULARY, head.matmul)
        return HEAD_AFTER[head.after].format(f"({logits}{self._operand(head.operand, VOCABULARY)})")

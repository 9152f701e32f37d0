"""The normal form of a decoder graph: matmuls with a parameter, lookups and attention cores.

Patterns are written against these few records instead of the many spellings of the graph.
"""

from dataclasses import dataclass, field

import torch
from torch import fx

from fgtp_pass.graph.op_kinds import (
    CASTS,
    TRANSPOSES,
    OpKind,
    argument,
    is_tensor,
    op_kind,
    op_name,
    tensor_inputs,
    value_of,
)


@dataclass(frozen=True, eq=False)
class Weight:
    """A parameter placeholder as an op uses it.

    `in_dim`, `out_dim`: which dim of the parameter the op contracts and which it produces (for a
    lookup table: rows and features). `cast`: the dtype that the graph casts it to before use.
    """

    placeholder: fx.Node
    in_dim: int
    out_dim: int
    cast: torch.dtype | None = None

    @property
    def value(self) -> torch.Tensor:
        tensor = value_of(self.placeholder)
        assert isinstance(tensor, torch.Tensor)
        return tensor

    @property
    def in_features(self) -> int:
        return int(self.value.shape[self.in_dim])

    @property
    def out_features(self) -> int:
        return int(self.value.shape[self.out_dim])


@dataclass(frozen=True, eq=False)
class ParamMatmul:
    """`node = input @ weight (+ bias)` with a 2-D weight that does not depend on activations.

    `weight` is None where the graph computes the weight (dequantisation, weight norm): such a
    matmul still separates components, but cannot be cut. `why_not` says what else forbids a cut.
    """

    node: fx.Node
    input: fx.Node
    weight: Weight | None
    bias: fx.Node | None = None
    why_not: str = ""

    @property
    def in_features(self) -> int:
        """By the weight where there is one: torch may write the result's width with symbols."""
        return self.weight.in_features if self.weight else int(value_of(self.input).shape[-1])

    @property
    def out_features(self) -> int:
        return self.weight.out_features if self.weight else int(value_of(self.node).shape[-1])


@dataclass(frozen=True, eq=False)
class Lookup:
    """`node = weight[ids]`: rows of a 2-D parameter picked by integers."""

    node: fx.Node
    ids: fx.Node
    weight: Weight
    why_not: str = ""


@dataclass
class NormalForm:
    """All normal-form records of one graph, by node and in graph order."""

    matmuls: dict[fx.Node, ParamMatmul] = field(default_factory=dict)
    lookups: dict[fx.Node, Lookup] = field(default_factory=dict)


def read_matmul(
    node: fx.Node, parameters: set[fx.Node], static: set[fx.Node]
) -> ParamMatmul | None:
    """The record of a matmul of an activation with a static 2-D weight, or None."""
    name, args = op_name(node), node.args
    bias: object = None
    if name == "linear":
        data, raw = argument(node, "input", 0), argument(node, "weight", 1)
        bias, transposed = argument(node, "bias", 2), True
    elif name == "addmm":
        bias, transposed = argument(node, "input", 0), False
        data, raw = argument(node, "mat1", 1), argument(node, "mat2", 2)
    elif name in ("matmul", "mm"):
        data, transposed = args[0], False
        raw = args[1] if len(args) > 1 else next(iter(node.kwargs.values()), None)
    else:
        return None
    if not isinstance(data, fx.Node) or not isinstance(raw, fx.Node):
        return None
    if data in static or raw not in static or value_of(raw).dim() != 2:
        return None
    weight = _trace_weight(raw, parameters, transposed)
    bias_node = bias if isinstance(bias, fx.Node) else None
    why_not = "" if weight else "its weight is computed in the graph"
    if name == "addmm" and (node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("beta", 1) != 1):
        why_not = "it is an addmm with a scale"
    if bias_node is not None and (bias_node not in static or value_of(bias_node).dim() != 1):
        why_not = "its added term is not a bias vector"
    elif bias_node is not None and bias_node not in parameters:
        why_not = "its bias is computed in the graph"
    return ParamMatmul(node, data, weight, bias_node, why_not)


def _trace_weight(node: fx.Node, parameters: set[fx.Node], transposed: bool) -> Weight | None:
    """Follow transposes and casts back to the parameter; `transposed` means [out, in]."""
    cast: torch.dtype | None = None
    while node not in parameters:
        name = op_name(node)
        if name in CASTS:
            if cast is not None and cast is not value_of(node).dtype:
                return None  # through a narrower dtype and back
            cast = value_of(node).dtype
        elif name in TRANSPOSES and value_of(node).dim() == 2:
            source = node.all_input_nodes[0]
            if value_of(source).shape != value_of(node).shape[::-1]:
                return None
            if name == "permute" and set(_permutation(node)) != {0, 1}:
                return None
            if not (name == "permute" and _permutation(node) == (0, 1)):
                transposed = not transposed
        elif name != "contiguous":
            return None
        inputs = tensor_inputs(node)
        if len(inputs) != 1:
            return None
        node = inputs[0]
    if value_of(node).dim() != 2:
        return None
    return Weight(node, *((1, 0) if transposed else (0, 1)), cast=cast)


def _permutation(node: fx.Node) -> tuple[int, ...]:
    dims = node.args[1:] if len(node.args) > 2 else node.args[1]
    return tuple(int(d) % 2 for d in dims)  # type: ignore[union-attr,arg-type]


def read_lookup(node: fx.Node, parameters: set[fx.Node]) -> Lookup | None:
    """The record of a lookup of rows in a 2-D parameter, or None."""
    if op_kind(node) is OpKind.LOOKUP:
        ids, table = argument(node, "input", 0), argument(node, "weight", 1)
        renormalised = argument(node, "max_norm", 3) is not None
        why_not = "its lookup renormalises the table in place" if renormalised else ""
    elif op_name(node) in ("getitem", "index_select"):
        table, ids = node.args[0], node.args[-1]
        why_not = "it is indexed, which takes negative ids too"
    else:
        return None
    if table not in parameters or value_of(table).dim() != 2:
        return None
    if not isinstance(ids, fx.Node) or not is_tensor(ids):
        return None
    return Lookup(node, ids, Weight(table, in_dim=0, out_dim=1), why_not)

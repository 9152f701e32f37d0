"""What an FX node of a Dynamo-level graph does, whatever spelling the graph uses for it."""

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any

import torch
from torch import fx

from fgtp_pass.graph.size_expression import size_expression


class OpKind(Enum):
    """How an op treats tokens (all dims but the last) and features (the last dim)."""

    LAYOUT = "layout"  # moves or selects whole elements, computes nothing
    POINTWISE = "pointwise"  # each element on its own
    FEATURES = "features"  # local to a token, but needs its features together: norms, softmax
    MATMUL = "matmul"
    LOOKUP = "lookup"
    ATTENTION = "attention"
    SELECT = "select"  # the data decide which elements come out
    CHOICE = "choice"  # picks the best of the features: topk, argmax
    OTHER = "other"


_PLAIN_MODULES = {
    "torch",
    "_operator",
    "builtins",
    "torch._C._nn",
    "torch.nn.functional",
    "torch._C",
    "torch.functional",
    "torch._tensor",
    "torch._ops.aten",
    "torch.special",
}
_OPERATOR_NAMES = {
    "iadd": "add",
    "isub": "sub",
    "imul": "mul",
    "itruediv": "div",
    "truediv": "div",
    "ipow": "pow",
    "imatmul": "matmul",
    "and_": "bitwise_and",
    "or_": "bitwise_or",
    "numpy_T": "T",  # `x.T` in graphs of torch 2.15
    "_get_data_attr": "data",  # `x.data` in graphs of torch 2.13
}
# reorder, select or copy elements in row-major order or not; see `keeps_token_order`
_ORDER_KEEPING = {
    "view", "reshape", "flatten", "unflatten", "contiguous", "clone", "squeeze", "unsqueeze",
    "detach", "data", "alias", "view_as", "reshape_as", "dropout", "pos", "resolve_conj",
}  # fmt: skip
_LAYOUT = _ORDER_KEEPING | {
    "transpose", "permute", "t", "swapaxes", "swapdims", "movedim", "expand", "expand_as",
    "chunk", "split", "split_with_sizes", "tensor_split", "unbind", "narrow", "select", "getitem",
    "cat", "concat", "stack", "repeat", "repeat_interleave", "tile", "T", "mT", "getattr", "pad",
    "roll", "flip", "unfold", "index_copy", "setitem", "copy",
}  # fmt: skip
_CASTS = {"to", "type", "float", "half", "bfloat16", "double", "type_as", "int", "long"}
# pointwise, but without torch.Tag.pointwise on the ATen op of the same name
_MORE_POINTWISE = _CASTS | {
    "hardswish", "logsigmoid", "softsign", "tanhshrink", "selu", "floor_divide", "bitwise_and",
    "bitwise_or",
}  # fmt: skip
# torch.Tag.pointwise on one overload, but not as these names are used here
_NOT_POINTWISE = {"max", "min", "copy", "bernoulli", "normal", "prelu", "rrelu"}
_FEATURES = {
    "layer_norm", "rms_norm", "group_norm", "normalize", "softmax", "log_softmax", "mean", "sum",
    "var", "std", "norm", "vector_norm", "amax", "amin", "max", "min", "logsumexp", "glu",
    "prelu",
}  # fmt: skip
_MATMULS = {"linear", "matmul", "mm", "addmm", "bmm", "baddbmm", "einsum", "addbmm"}
_SELECTS = {
    "index_select", "gather", "masked_select", "nonzero", "take_along_dim", "take", "index",
    "index_put", "scatter", "scatter_add", "index_add",
}  # fmt: skip
_CHOICES = {"topk", "argmax", "argmin", "sort", "argsort", "one_hot", "multinomial"}
# ops that mix tokens: the convolution is that of linear attentions and state space models
_ATTENTIONS = {
    "scaled_dot_product_attention", "flex_attention", "multi_head_attention_forward", "conv1d",
}  # fmt: skip

SOFTMAX = "softmax"
CASTS = frozenset(_CASTS)
TRANSPOSES = frozenset({"T", "t", "mT", "transpose", "permute", "swapaxes", "swapdims"})
SHAPE_READS = frozenset({"size", "shape", "sym_size", "numel", "dim", "device", "dtype"})
# pointwise ops that scale or gate a value; every other op of two values merges them
_GATES = {"mul", "multiply", "div", "true_divide"}


def op_name(node: fx.Node) -> str:
    """The plain name of the op ("mul" for `a * b`, `torch.mul`, `a.mul_(b)`, `aten.mul.Tensor`).

    Ops of other namespaces keep theirs ("vllm::unified_attention"); unknown callables give "".
    """
    if node.op == "call_method":
        name = str(node.target)
    elif node.op == "call_function":
        if node.target is getattr and len(node.args) > 1:
            name = str(node.args[1])
        else:
            name = _function_name(node.target)
    else:
        return ""
    if name.endswith("_") and not name.endswith("__") and name not in _OPERATOR_NAMES:
        name = name[:-1]
    return _OPERATOR_NAMES.get(name, name)


@functools.cache
def _function_name(target: Callable[..., Any]) -> str:
    if isinstance(target, torch._ops.OpOverload):
        target = target.overloadpacket
    if isinstance(target, torch._ops.OpOverloadPacket):
        namespace, _, name = str(target._qualified_op_name).partition("::")
        return name if namespace == "aten" else f"{namespace}::{name}"
    if isinstance(target, torch._ops.HigherOrderOperator):
        return str(target.name())  # type: ignore[no-untyped-call]
    module = getattr(target, "__module__", None) or ""
    name = getattr(target, "__name__", "")
    known = module in _PLAIN_MODULES or inspect.isbuiltin(target)
    known = known or inspect.ismethoddescriptor(target)
    return name if known else ""


@functools.cache
def _tagged_pointwise(name: str) -> bool:
    packet = getattr(torch.ops.aten, name, None)
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        return False
    overloads = packet.overloads()  # type: ignore[no-untyped-call]
    return any(torch.Tag.pointwise in getattr(packet, name).tags for name in overloads)


@functools.cache
def _kind_of_name(name: str) -> OpKind:
    for kind, names in (
        (OpKind.MATMUL, _MATMULS),
        (OpKind.LOOKUP, {"embedding"}),
        (OpKind.ATTENTION, _ATTENTIONS),
        (OpKind.CHOICE, _CHOICES),
        (OpKind.SELECT, _SELECTS),
        (OpKind.LAYOUT, _LAYOUT),
        (OpKind.FEATURES, _FEATURES),
    ):
        if name in names:
            return kind
    if name in _MORE_POINTWISE or (name not in _NOT_POINTWISE and _tagged_pointwise(name)):
        return OpKind.POINTWISE
    # A fused attention kernel is an op of its own (vLLM, flash-attn); its op name says so.
    if "::" in name and "attention" in name:
        return OpKind.ATTENTION
    if "::" in name and ("rms_norm" in name or "layer_norm" in name):
        return OpKind.FEATURES
    return OpKind.OTHER


def op_kind(node: fx.Node) -> OpKind:
    """What the node does with tokens and features; OTHER for everything unknown."""
    name = op_name(node)
    if name == "dropout" and argument(node, "training", 2, default=True) is not False:
        return OpKind.OTHER
    if name == "getitem" and _indexed_by_tensor(node):
        return OpKind.SELECT
    if name == "conv1d" and value_of(argument(node, "weight", 1)).shape[-1] == 1:
        return OpKind.OTHER  # mixes no tokens
    if name in ("max", "min", "minimum", "maximum") and len(tensor_inputs(node)) > 1:
        return OpKind.POINTWISE
    return _kind_of_name(name)


def argument(node: fx.Node, name: str, position: int, default: Any = None) -> Any:
    """A call's argument, given by keyword or by position."""
    if name in node.kwargs:
        return node.kwargs[name]
    return node.args[position] if len(node.args) > position else default


def value_of(node: fx.Node) -> Any:
    """The fake value that Dynamo recorded for the node, or None."""
    return node.meta.get("example_value")


def same_leading(one: fx.Node, other: fx.Node) -> bool:
    """Whether the sizes of all dims of two values but their last are the same in this graph."""
    return _same_sizes(value_of(one).shape[:-1], value_of(other).shape[:-1])


def same_shape(one: fx.Node, other: fx.Node) -> bool:
    """Whether two values have the same sizes in this graph; comparing adds no guard."""
    return _same_sizes(value_of(one).shape, value_of(other).shape)


def _same_sizes(some: Sequence[int | torch.SymInt], others: Sequence[int | torch.SymInt]) -> bool:
    return len(some) == len(others) and all(map(_same_size, some, others))


def _same_size(one: int | torch.SymInt, other: int | torch.SymInt) -> bool:
    if count_of([one]) == count_of([other]):
        return True
    if isinstance(one, int):
        one, other = other, one
    # where torch had to know whether a computed size is 1, later ops have the number in its place
    known = isinstance(one, torch.SymInt) and isinstance(other, int) and one.node.has_hint()
    return known and bool(one.node.hint == other)  # type: ignore[union-attr]


def count_of(sizes: Sequence[int | torch.SymInt]) -> object:
    """The product of sizes: an int, or an expression in input sizes; comparing adds no guard."""
    return size_expression(math.prod(sizes))


def is_tensor(node: Any) -> bool:
    return isinstance(node, fx.Node) and isinstance(value_of(node), torch.Tensor)


def is_value(node: fx.Node) -> bool:
    """Whether the node holds tensor data: a tensor, or a list of tensors (as `chunk` gives)."""
    value = value_of(node)
    if isinstance(value, torch.Tensor):
        return True
    # torch.Size is a tuple too, of numbers
    return isinstance(value, (tuple, list)) and any(isinstance(v, torch.Tensor) for v in value)


def tensor_inputs(node: fx.Node) -> list[fx.Node]:
    """The inputs that carry tensor data, each once, in order."""
    return [n for n in node.all_input_nodes if is_value(n)]


def _indexed_by_tensor(node: fx.Node) -> bool:
    index = node.args[1]
    return any(is_tensor(i) for i in (index if isinstance(index, (tuple, list)) else (index,)))


def picks_from(user: fx.Node, node: fx.Node) -> bool:
    """Whether `user` takes single entries of the features of `node`, or asks for the best one."""
    name = op_name(user)
    if name in ("gather", "take_along_dim"):
        return user.args[0] is node
    if name in ("max", "min") and not is_tensor(user):  # (values, indices)
        return any(op_name(u) == "getitem" and u.args[1] == 1 for u in user.users)
    return False


def merges(node: fx.Node) -> bool:
    """Whether the op mixes values of equal standing (a residual add, a cat), unlike a gate."""
    return op_name(node) not in _GATES


def keeps_token_order(node: fx.Node) -> bool:
    """Whether a LAYOUT op leaves the elements in row-major order and the last dim as it is."""
    if op_name(node) not in _ORDER_KEEPING or op_kind(node) is not OpKind.LAYOUT:
        return False
    if not node.all_input_nodes or not is_tensor(node.all_input_nodes[0]):
        return False
    before, after = value_of(node.all_input_nodes[0]), value_of(node)
    return before.shape[-1:] == after.shape[-1:] and before.dtype is after.dtype


def keeps_values(source: torch.dtype, target: torch.dtype) -> bool:
    """Whether a cast from one dtype to the other and back gives every value again."""
    if source is target:
        return True
    if not (source.is_floating_point and target.is_floating_point):
        return False
    narrow, wide = torch.finfo(source), torch.finfo(target)
    return (
        wide.max >= narrow.max
        and wide.eps <= narrow.eps
        and wide.smallest_normal <= narrow.smallest_normal
        and wide.smallest_normal * wide.eps <= narrow.smallest_normal * narrow.eps
    )

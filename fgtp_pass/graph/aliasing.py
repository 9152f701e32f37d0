"""What an op changes in place, and whose memory its result may share.

What cannot be known is taken for so: a value that seems to change keeps a site whole, one that only
seems to stay would be read at the wrong time.
"""

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx

from fgtp_pass.graph.op_kinds import (
    CASTS,
    OpKind,
    argument,
    is_tensor,
    is_value,
    op_kind,
    op_name,
    tensor_inputs,
    value_of,
)

_IN_PLACE_OPERATORS = {
    "iadd", "iand", "ifloordiv", "ilshift", "imatmul", "imod", "imul", "ior", "ipow", "irshift",
    "isub", "itruediv", "ixor", "setitem",
}  # fmt: skip
# their schemas do not say that they update running statistics
_UPDATES_STATISTICS = {"batch_norm", "instance_norm", "native_batch_norm"}

# layout ops whose result is always new
_COPIES = {"clone", "cat", "concat", "stack", "repeat", "repeat_interleave", "tile", "roll", "flip"}


def written_nodes(node: fx.Node) -> list[fx.Node]:
    """The nodes whose tensors the op changes in place, or may change: an unknown op may all."""
    if node.op not in ("call_function", "call_method"):
        return []
    schema = _schema_of(node.target)
    if schema is not None:
        written = [
            argument(node, item.name, position)
            for position, item in enumerate(schema.arguments)
            if item.alias_info is not None and item.alias_info.is_write
        ]
        return list(_tensors(written))
    if not _is_known(node):
        return tensor_inputs(node)
    written = [node.kwargs.get("out")]
    if node.args and (_named_in_place(node) or _inplace_flag(node)):
        written.append(node.args[0])
    return list(_tensors(written))


def shares_memory_with(node: fx.Node) -> list[fx.Node]:
    """The inputs whose memory the result may be a view of."""
    written = written_nodes(node)
    if written or not is_value(node):
        return written
    schema = _schema_of(node.target)
    if schema is not None:
        shared = [
            argument(node, item.name, position)
            for position, item in enumerate(schema.arguments)
            if item.alias_info is not None
        ]
        return list(_tensors(shared))
    inputs = tensor_inputs(node)
    if op_name(node) in CASTS:
        return inputs[:1] if inputs and _same_dtype(inputs[0], node) else []
    views = op_kind(node) is OpKind.LAYOUT and op_name(node) not in _COPIES
    return inputs if views or op_kind(node) is OpKind.OTHER else []


def _schema_of(target: Any) -> Any:
    """The schema of an op that graphs name by itself; torch's Python functions have none."""
    if isinstance(target, torch._ops.OpOverloadPacket):
        target = getattr(target, target.overloads()[0])  # type: ignore[no-untyped-call]
    return target._schema if isinstance(target, torch._ops.OpOverload) else None


def _is_known(node: fx.Node) -> bool:
    """Whether torch's naming says what the function changes: a trailing _, `out`, `inplace`."""
    name = op_name(node)
    if op_kind(node) is not OpKind.OTHER or (name and not is_value(node)):
        return True
    return hasattr(torch.ops.aten, name) and name not in _UPDATES_STATISTICS


def _named_in_place(node: fx.Node) -> bool:
    if node.op == "call_method":
        name = str(node.target)
        return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
    name = getattr(node.target, "__name__", "")
    if getattr(node.target, "__module__", "") == "_operator":
        return name in _IN_PLACE_OPERATORS
    return name.endswith("_") and not name.endswith("__")


def _inplace_flag(node: fx.Node) -> bool:
    target = node.target
    if getattr(target, "__module__", None) != "torch.nn.functional":
        return False
    signature = _signature_of(target)
    try:
        bound = signature.bind(*node.args, **node.kwargs) if signature else None
    except TypeError:
        return False
    return bool(bound and bound.arguments.get("inplace", False))


@functools.cache
def _signature_of(target: Callable[..., Any]) -> inspect.Signature | None:
    try:
        return inspect.signature(target)
    except ValueError:
        return None


def _tensors(values: Iterable[Any]) -> Iterable[fx.Node]:
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from _tensors(value)
        elif is_tensor(value):
            yield value


def _same_dtype(one: fx.Node, other: fx.Node) -> bool:
    return getattr(value_of(one), "dtype", None) is getattr(value_of(other), "dtype", None)

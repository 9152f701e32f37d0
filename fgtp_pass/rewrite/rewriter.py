"""Rewriter: the one way to write a graph. It copies nodes and emits new ones with fake values."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher

from fgtp_pass import dynamo
from fgtp_pass.graph.op_kinds import value_of


class Rewriter:
    """Writes the new graph: copies nodes of the old one and emits new ones with fake values."""

    def __init__(self, graph: fx.Graph):
        self.old = graph
        self.new = fx.Graph()
        self.env: dict[fx.Node, Any] = {}
        self._seen: dict[tuple[Any, str], Any] = {}
        self.fake_mode = dynamo.recorded_fake_mode(graph)

    def copy(self, node: fx.Node) -> None:
        self.env[node] = self._copy(node)

    def _copy(self, node: fx.Node) -> fx.Node:
        copied = self.new.node_copy(node, lambda n: self.env[n])
        dynamo.copy_source(node, copied)
        return copied

    def placeholder_like(self, node: fx.Node, shape: Sequence[int]) -> fx.Node:
        """A placeholder in the place of `node` for a tensor of another shape."""
        copied, value = self._copy(node), value_of(node)
        with self.fake_mode:
            copied.meta["example_value"] = torch.empty(
                tuple(shape), dtype=value.dtype, device=value.device
            )
        return copied

    def emit(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A new node with its fake value. Layers are alike, so each distinct call runs once."""
        node = self.new.call_function(target, args, kwargs)
        fakes = fx.map_arg((args, kwargs), value_of)
        key = (target, repr(fx.map_arg((args, kwargs), lambda n: _signature(value_of(n)))))
        if key not in self._seen:
            with self.fake_mode, enable_python_dispatcher(), torch.no_grad():
                self._seen[key] = target(*fakes[0], **fakes[1])
        node.meta["example_value"] = self._seen[key]
        return node


def _signature(value: Any) -> fx.Node | str:
    """All that the shape, type and place of a call's result can depend on."""
    if isinstance(value, torch.Tensor):
        return f"{tuple(value.shape)} {value.stride()} {value.dtype} {value.device}"
    return str(value)

"""The ops between the up and down projections of an FFN, at the width of one rank's features."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from fgtp_pass.collectives.functional import Emit
from fgtp_pass.graph.op_kinds import op_name
from fgtp_pass.graph.region import Region


def emit_region(
    emit: Emit,
    region: Region,
    up_values: list[Any],
    width: int,
    outside: Mapping[fx.Node, Any],
) -> Any:
    """What the region computes of `up_values` [tokens, blocks * width], without its views.

    outside: what stands for the vectors and scalars that it reads.
    """
    values: dict[fx.Node, Any] = {
        up.node: value for up, value in zip(region.ups, up_values, strict=True)
    }

    def operand(node: fx.Node) -> Any:
        node = region.alias.get(node, node)
        return values[node] if node in values else outside[node]

    for node in region.ops:
        name = op_name(node)
        if name in ("chunk", "split"):
            values[node] = operand(node.all_input_nodes[0])
        elif name == "getitem":
            source = node.all_input_nodes[0]
            kept = region.blocks[node]
            held = region.blocks[region.alias.get(source, source)]
            start = held.index(kept[0]) * width
            values[node] = emit(torch.narrow, operand(source), -1, start, len(kept) * width)
        else:
            args, kwargs = fx.map_arg((node.args, node.kwargs), operand)
            values[node] = emit_again(emit, node, args, kwargs)
    return values[region.result]


def emit_again(emit: Emit, node: fx.Node, args: Any, kwargs: Any) -> Any:
    """The op of a node, on other operands."""
    if node.op == "call_method":
        return emit(getattr(torch.Tensor, str(node.target)), *args, **kwargs)
    return emit(node.target, *args, **kwargs)

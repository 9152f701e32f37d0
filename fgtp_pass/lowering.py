"""How each step of a path through the placement algebra is written as ops.

Everything works on [tokens, features] with the leading dims flattened, and takes an `emit` that
either writes a node into a graph or runs the op, so there is one lowering for both.
"""

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from fgtp_pass import collectives
from fgtp_pass.algebra import APPLY, Apply, Cut, Move, Placement
from fgtp_pass.collectives import ComponentGroup, Emit
from fgtp_pass.normal_form import ParamMatmul, Weight
from fgtp_pass.ops import op_name
from fgtp_pass.pattern import LookupStage, MatmulStage
from fgtp_pass.plan import WeightCut
from fgtp_pass.planner import PlannedSite
from fgtp_pass.region import Region


@dataclass
class SiteLowering:
    """Writes one site along its path.

    local: for each parameter placeholder of the site, what stands for it here (the shard, or the
    whole bias). outer: what stands for any other node that the site reads.
    """

    emit: Emit
    site: PlannedSite
    group: ComponentGroup
    local: Mapping[fx.Node, Any]
    outer: Mapping[fx.Node, Any]

    def run(self, x: Any, rows: Any) -> Any:
        """[rows, features] of this rank's tokens (ids: [rows]) -> [rows, features]."""
        late_bias: Any = None
        values = [x]
        for step in self.site.path.steps:
            if isinstance(step, Move):
                values = [self._move(step, values[0], rows)]
                if step.source is Placement.SUM and late_bias is not None:
                    values = [self.emit(torch.add, values[0], late_bias)]
                continue
            stage = self.site.match.stages[step.stage]
            if isinstance(stage, LookupStage):
                values = [self._lookup(stage, values[0])]
                continue
            values, late_bias = self._matmuls(step, stage, values[0])
            if stage.region is not None:
                values = [self._region(stage.region, values)]
        return values[0]

    # moves ------------------------------------------------------------------------------------

    def _move(self, move: Move, x: Any, rows: Any) -> Any:
        emit, group = self.emit, self.group
        match move.source, move.target:
            case Placement.OWN, Placement.ALL:
                return collectives.all_gather(emit, group, x)
            case Placement.OWN, Placement.CUT:
                return own_to_cut(emit, group, x, rows, self._cut_of(self.site.match.stages[0]))
            case Placement.CUT, Placement.OWN:
                return cut_to_own(emit, group, x, rows, self._cut_of(self.site.match.stages[-1]))
            case Placement.SUM, Placement.OWN:
                return collectives.reduce_scatter(emit, group, x, rows, self._out_features())
        raise AssertionError(f"no collective goes from {move.source} to {move.target}")

    def _out_features(self) -> int:
        stage = self.site.match.stages[-1]
        if isinstance(stage, LookupStage):
            return stage.lookup.weight.out_features
        weight = stage.matmuls[0].weight
        assert weight is not None
        return weight.out_features

    def _cut_of(self, stage: LookupStage | MatmulStage) -> WeightCut:
        assert isinstance(stage, MatmulStage)
        weight = stage.matmuls[0].weight
        assert weight is not None
        return self.site.cuts[weight.placeholder]

    # weights ----------------------------------------------------------------------------------

    def _lookup(self, stage: LookupStage, ids: Any) -> Any:
        """Rows of this rank's part of the table; zeros for ids that another rank holds."""
        emit = self.emit
        cut = self.site.cuts[stage.lookup.weight.placeholder]
        height = cut.block_width(self.group.size)
        here = emit(torch.sub, ids, self.group.rank * height)
        mine = emit(torch.logical_and, emit(torch.ge, here, 0), emit(torch.lt, here, height))
        safe = emit(torch.where, mine, here, 0)
        rows = emit(F.embedding, safe, self.local[stage.lookup.weight.placeholder])
        return emit(torch.where, emit(torch.unsqueeze, mine, -1), rows, 0.0)

    def _matmuls(self, step: Apply, stage: MatmulStage, x: Any) -> tuple[list[Any], Any]:
        """The results side by side, and the bias that is to be added after the sum, if any."""
        sums = APPLY[step.cut][1] is Placement.SUM
        results = []
        late_bias: Any = None
        for matmul in stage.matmuls:
            assert matmul.weight is not None
            weight = self.local[matmul.weight.placeholder]
            bias = self.local[matmul.bias] if matmul.bias is not None else None
            if sums:
                bias, late_bias = None, bias
            if step.cut is Cut.IN and step.stage > 0:
                weight = self._drop_padding(weight, matmul.weight, matmul.weight.in_dim)
            results.append(self._matmul(matmul, x, weight, bias))
        return results, late_bias

    def _matmul(self, matmul: ParamMatmul, x: Any, weight: Any, bias: Any) -> Any:
        assert matmul.weight is not None
        if matmul.weight.cast is not None:
            weight = self.emit(torch.Tensor.to, weight, matmul.weight.cast)
        if matmul.weight.out_dim == 0:
            return self.emit(F.linear, x, weight, bias)
        if bias is not None:
            return self.emit(torch.addmm, bias, x, weight)
        return self.emit(torch.mm, x, weight)

    # regions ----------------------------------------------------------------------------------

    def _region(self, region: Region, up_values: list[Any]) -> Any:
        """The ops between up and down matmuls at this rank's width, without their views."""
        values: dict[fx.Node, Any] = {
            up.node: value for up, value in zip(region.ups, up_values, strict=True)
        }
        width = -(-region.width // self.group.size)
        for node in region.ops:
            if op_name(node) in ("chunk", "split"):
                values[node] = values[self._stands_for(region, node.all_input_nodes[0])]
            elif op_name(node) == "getitem":
                source = self._stands_for(region, node.all_input_nodes[0])
                kept, held = region.blocks[node], region.blocks[source]
                start = held.index(kept[0]) * width
                values[node] = self.emit(torch.narrow, values[source], -1, start, len(kept) * width)
            else:
                args, kwargs = fx.map_arg(
                    (node.args, node.kwargs), lambda n: self._operand(region, values, n)
                )
                values[node] = self._again(node, args, kwargs)
        result = values[region.result]
        own = self._own_features(region.width)
        if own < width:
            result = self.emit(torch.narrow, result, -1, 0, own)
        return result

    def _again(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        if node.op == "call_method":
            return self.emit(getattr(torch.Tensor, str(node.target)), *args, **kwargs)
        return self.emit(node.target, *args, **kwargs)

    @staticmethod
    def _stands_for(region: Region, node: fx.Node) -> fx.Node:
        return region.alias.get(node, node)

    def _operand(self, region: Region, values: Mapping[fx.Node, Any], node: fx.Node) -> Any:
        node = self._stands_for(region, node)
        for known in (values, self.local, self.outer):
            if node in known:
                return known[node]
        raise AssertionError(f"{node} is no operand of the region")

    def _own_features(self, width: int) -> int:
        """How many of a rank's inner features are real; the rest pad the last shard.

        Padding never reaches the down matmul: an activation of zero need not be finite.
        """
        local = -(-width // self.group.size)
        return max(0, min(local, width - self.group.rank * local))

    def _drop_padding(self, shard: Any, weight: Weight, dim: int) -> Any:
        own = self._own_features(weight.in_features)
        if own == -(-weight.in_features // self.group.size):
            return shard
        return self.emit(torch.narrow, shard, dim, 0, own)


def own_to_cut(emit: Emit, group: ComponentGroup, x: Any, rows: Any, cut: WeightCut) -> Any:
    """[rows, W] -> [k*rows, W/k]: each rank gets its features of everyone's tokens.

    cut: of the weight that takes these features, along its inputs.
    """
    k, width = group.size, cut.block_width(group.size)
    padding = k * width - cut.shape[cut.dim]
    if padding:
        x = emit(F.pad, x, (0, padding))
    parts = emit(torch.reshape, x, (rows, k, width))
    by_rank = emit(torch.transpose, parts, 0, 1)
    # explicit sizes: a -1 would make the number of rows a guard
    every = rows * k if isinstance(rows, int) else emit(operator.mul, rows, k)
    return collectives.all_to_all(emit, group, emit(torch.reshape, by_rank, (every, width)), rows)


def cut_to_own(emit: Emit, group: ComponentGroup, x: Any, rows: Any, cut: WeightCut) -> Any:
    """[k*rows, W/k] -> [rows, W]: each rank gets all features of its own tokens.

    cut: of the weight that made these features, along its outputs.
    """
    k, blocks, width = group.size, cut.blocks, cut.block_width(group.size)
    block = cut.shape[cut.dim] // blocks
    parts = collectives.all_to_all(emit, group, x, rows)
    by_rank = emit(torch.reshape, parts, (k, rows, blocks, width))
    by_token = emit(torch.permute, by_rank, (1, 2, 0, 3))
    whole = emit(torch.reshape, by_token, (rows, blocks, k * width))
    if k * width > block:
        whole = emit(torch.narrow, whole, 2, 0, block)
    return emit(torch.reshape, whole, (rows, blocks * block))


def flatten_tokens(emit: Emit, site: PlannedSite, x: Any) -> Any:
    """[..., features] -> [tokens, features]; ids: [...] -> [tokens]."""
    if isinstance(site.match.stages[0], LookupStage):
        return emit(torch.reshape, x, (-1,))
    weight = site.match.stages[0].matmuls[0].weight
    assert weight is not None
    return emit(torch.reshape, x, (-1, weight.in_features))


def pad_tokens(emit: Emit, x: Any, rows: Any, features: int | None) -> Any:
    """[tokens, features] -> [rows, features] with zeros at the end; rows >= tokens.

    features: None for ids [tokens]. Appending all `rows` of zeros before cutting never asks
    whether anything is to be padded, which would compile the answer in.
    """
    if features is None:  # a cat of 1-D tensors asks whether one is empty
        column = pad_tokens(emit, emit(torch.unsqueeze, x, 1), rows, 1)
        return emit(torch.squeeze, column, 1)
    zeros = emit(torch.Tensor.new_zeros, x, (rows, features))
    return emit(torch.narrow, emit(torch.cat, [x, zeros]), 0, 0, rows)


def rows_of(emit: Emit, x: Any) -> Any:
    return emit(torch.ops.aten.sym_size.int, x, 0)

"""How each step of a path through the placement algebra is written as ops.

Everything works on [tokens, features] with the leading dims flattened, and takes an `emit` that
either writes a node into a graph or runs the op, so there is one lowering for both.
"""

from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from fgtp_pass.algebra.path import RESIDUAL, Apply, Move
from fgtp_pass.algebra.placement import APPLY, Cut, Placement
from fgtp_pass.collectives import functional
from fgtp_pass.collectives.functional import Emit
from fgtp_pass.collectives.groups import ComponentGroup
from fgtp_pass.detect.match import LookupStage, MatmulStage
from fgtp_pass.graph.normal_form import ParamMatmul, Weight
from fgtp_pass.graph.op_kinds import value_of
from fgtp_pass.plan.plan import WeightCut
from fgtp_pass.plan.planner import PlannedSite
from fgtp_pass.rewrite import moves
from fgtp_pass.rewrite.feature_ops import emit_region
from fgtp_pass.rewrite.whole_weights import WholeWeights


@dataclass(frozen=True)
class Values:
    """What a site has so far: its values side by side, and what is still to be added to each.

    late_biases: added after the sum, once. residual: that of the group's tokens, where it came
    along beside the result.
    """

    values: tuple[Any, ...]
    late_biases: tuple[Any, ...] = ()
    residual: Any = None


@dataclass
class SiteLowering:
    """Writes one site along its path.

    local: for each parameter placeholder of the site, what stands for it here (the shard, or the
    whole bias). outer: what stands for any other node that the site reads. whole: where weights are
    gathered, these.
    """

    emit: Emit
    site: PlannedSite
    group: ComponentGroup
    local: Mapping[fx.Node, Any]
    outer: Mapping[fx.Node, Any]
    whole: WholeWeights

    def run(
        self,
        x: Any,
        rows: Any,
        residual: Any = None,
        beside: Values | None = None,
        summed: torch.dtype | None = None,
    ) -> Values:
        """The site's path, from [rows, features] (ids: [rows]) to [rows, features] by output.

        Where the path starts or ends in another placement than `Own`, these are of all tokens of
        the group: [k*rows, ...]. residual: [rows, features], for the move that carries it. beside:
        the sums of a site whose result is added to this one's. summed: the dtype of sums for all.
        """
        now, done = Values((x,)), 0
        for step in self.site.path.steps:
            if isinstance(step, Apply):
                now, done = self._apply(step, now.values[0], rows), step.stage + 1
                continue
            if beside is not None and step.source is Placement.SUM:
                now = self._added(now, beside)
            if step.source is Placement.SUM:
                now = self._summed(step, now, rows, residual, summed)
            else:
                carried = residual if RESIDUAL in step.carries else None
                now = self._move(step, now, done, rows, carried)
        return now

    def _apply(self, step: Apply, x: Any, rows: Any) -> Values:
        stage = self.site.match.stages[step.stage]
        if isinstance(stage, LookupStage):
            return Values((self._lookup(stage, x),), (None,))
        if step.cut is None:
            return self._apply_whole(stage, x, rows)
        now = self._matmuls(step, stage, x)
        if stage.region is not None:
            width = -(-stage.region.width // self.group.size)
            outside = ChainMap(dict(self.local), dict(self.outer))
            result = emit_region(self.emit, stage.region, list(now.values), width, outside)
            own = self._own_features(stage.region.width)
            if own < width:
                result = self.emit(torch.narrow, result, -1, 0, own)
            now = Values((result,), (None,))
        return now

    def _apply_whole(self, stage: MatmulStage, x: Any, rows: Any) -> Values:
        """The stage on own tokens, [rows, ...], with its weights gathered."""
        results = [self._whole_matmul(matmul, x, rows) for matmul in stage.matmuls]
        if stage.region is None:
            return Values(tuple(results), (None,) * len(results))
        vectors = {v: self._whole_vector(v) for v in stage.region.vectors}
        outside = ChainMap(vectors, dict(self.local), dict(self.outer))
        width = stage.region.width
        return Values((emit_region(self.emit, stage.region, results, width, outside),), (None,))

    def _whole_matmul(self, matmul: ParamMatmul, x: Any, rows: Any) -> Any:
        assert matmul.weight is not None
        cut, out_dim = self.site.cuts[matmul.weight.placeholder], matmul.weight.out_dim
        parts = self.whole.take(matmul.weight.placeholder)
        if matmul.weight.cast is not None:
            parts = self.emit(torch.Tensor.to, parts, matmul.weight.cast)
        k, dtype = self.group.size, value_of(matmul.node).dtype
        result = moves.times_whole(self.emit, x, rows, parts, cut, k, out_dim, dtype)
        if matmul.bias is None:
            return result
        whole = self.site.cuts[matmul.bias].cut_dim is None
        bias = self.local[matmul.bias] if whole else self._whole_vector(matmul.bias)
        return self.emit(torch.add, result, bias)

    def _whole_vector(self, placeholder: fx.Node) -> Any:
        parts = self.emit(torch.unsqueeze, self.whole.take(placeholder), 0)
        cut, k = self.site.cuts[placeholder], self.group.size
        return self.emit(torch.squeeze, moves.in_order(self.emit, parts, 1, cut, k), 0)

    def _added(self, now: Values, beside: Values) -> Values:
        (x,), (y,) = now.values, beside.values
        biases = [bias for bias in (*now.late_biases, *beside.late_biases) if bias is not None]
        bias = self.emit(torch.add, *biases) if len(biases) > 1 else next(iter(biases), None)
        return Values((self.emit(torch.add, x, y),), (bias,))

    # moves ------------------------------------------------------------------------------------

    def _move(self, move: Move, now: Values, done: int, rows: Any, residual: Any) -> Values:
        """One collective, whatever the number of values; only a site's last move has several.

        done: the number of stages that are applied.
        """
        emit, group, x = self.emit, self.group, now.values[0]
        match move.source, move.target:
            case Placement.OWN, Placement.ALL:
                return Values((functional.all_gather(emit, group, x),))
            case Placement.ALL, Placement.OWN:
                return Values(tuple(moves.all_to_own(emit, group, v, rows) for v in now.values))
            case Placement.OWN, Placement.CUT:
                return Values((moves.own_to_cut(emit, group, x, rows, self._features(done)[0]),))
            case Placement.ALL, Placement.CUT:
                return Values((moves.all_to_cut(emit, group, x, self._features(done)[0]),))
            case Placement.CUT, Placement.OWN:
                features, values = self._features(done), self._padded(now.values, done)
                return Values(tuple(moves.cut_to_own(emit, group, values, rows, features)))
            case Placement.CUT, Placement.ALL:
                (cut,), (x,) = self._features(done), self._padded(now.values, done)
                whole, residual = moves.cut_to_all(emit, group, x, rows, cut, residual)
                return Values((whole,), residual=residual)
        raise AssertionError(f"no move goes from {move.source} to {move.target}")

    def _summed(
        self, move: Move, now: Values, rows: Any, residual: Any, dtype: torch.dtype | None
    ) -> Values:
        emit, group = self.emit, self.group
        widths = [weight.out_features for weight in _weights_of(self.site.match.stages[-1])]
        if move.target is Placement.ALL:
            carried = residual if RESIDUAL in move.carries else None
            given = value_of(self.site.match.outputs[0]).dtype
            (x,), (width,) = now.values, widths
            sums = [moves.sum_to_all(emit, group, x, rows, width, given, dtype or given, carried)]
        else:
            sums = moves.sum_to_own(emit, group, now.values, rows, widths)
        return Values(
            tuple(
                value if bias is None else emit(torch.add, value, bias)
                for value, bias in zip(sums, now.late_biases, strict=True)
            )
        )

    def _features(self, done: int) -> list[WeightCut]:
        """How the features are cut at this point of the path: as the weights there are.

        Between two stages they are one block, whatever the first one's weights are.
        """
        stages = self.site.match.stages
        if done in (0, len(stages)):
            stage = stages[0] if done == 0 else stages[-1]
            return [self.site.cuts[weight.placeholder] for weight in _weights_of(stage)]
        width = _weights_of(stages[done])[0].in_features
        return [WeightCut(fqn="", shape=(width,), dtype="", cut_dim=0)]

    def _padded(self, values: tuple[Any, ...], done: int) -> list[Any]:
        """The values between two stages at the width that all ranks have."""
        if done == len(self.site.match.stages):
            return list(values)
        width = self._features(done)[0].block_width(self.group.size)
        missing = width - self._own_features(self._features(done)[0].shape[0])
        return [self.emit(F.pad, v, (0, missing)) if missing else v for v in values]

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

    def _matmuls(self, step: Apply, stage: MatmulStage, x: Any) -> Values:
        """The results side by side, and for each the bias to add after the sum, if any."""
        assert step.cut is not None
        sums = APPLY[step.cut][1] is Placement.SUM
        results, late_biases = [], []
        for matmul in stage.matmuls:
            assert matmul.weight is not None
            weight = self.local[matmul.weight.placeholder]
            bias = self.local[matmul.bias] if matmul.bias is not None else None
            late_biases.append(bias if sums else None)
            if sums:
                bias = None
            if step.cut is Cut.IN and step.stage > 0:
                weight = self._drop_padding(weight, matmul.weight, matmul.weight.in_dim)
            results.append(self._matmul(matmul, x, weight, bias))
        return Values(tuple(results), tuple(late_biases))

    def _matmul(self, matmul: ParamMatmul, x: Any, weight: Any, bias: Any) -> Any:
        assert matmul.weight is not None
        if matmul.weight.cast is not None:
            weight = self.emit(torch.Tensor.to, weight, matmul.weight.cast)
        if matmul.weight.out_dim == 0:
            return self.emit(F.linear, x, weight, bias)
        if bias is not None:
            return self.emit(torch.addmm, bias, x, weight)
        return self.emit(torch.mm, x, weight)

    def _own_features(self, width: int) -> int:
        """How many of a rank's inner features are real; the rest pad the last shard.

        Padding never reaches the next stage: an activation of zero need not be finite.
        """
        local = -(-width // self.group.size)
        return max(0, min(local, width - self.group.rank * local))

    def _drop_padding(self, shard: Any, weight: Weight, dim: int) -> Any:
        own = self._own_features(weight.in_features)
        if own == -(-weight.in_features // self.group.size):
            return shard
        return self.emit(torch.narrow, shard, dim, 0, own)


def _weights_of(stage: LookupStage | MatmulStage) -> list[Weight]:
    if isinstance(stage, LookupStage):
        return [stage.lookup.weight]
    return [matmul.weight for matmul in stage.matmuls if matmul.weight is not None]


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

"""Layers that are born sharded: the full weight never exists on any rank.

A planned layer is built as if its tensor-parallel group were its component group, so vLLM's own
loaders, of every quantisation that supports tensor parallelism, read only its shard. Its forward
emits a marker op of the whole layer's shape. With tensor parallelism T > 1 the shard is part
(t*k + g) of T*k for TP rank t and place g in the component group, which is part g of what rank t
would hold without the pass; the layer's own all_reduce stays.
"""

import math
from typing import Any
from unittest import mock

import torch
from torch import nn
from vllm.distributed import parallel_state, tensor_model_parallel_all_reduce
from vllm.forward_context import is_forward_context_available
from vllm.model_executor.custom_op import PluggableLayer, op_registry_oot
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (
    DEFAULT_VOCAB_PADDING_SIZE,
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)

from fgtp_pass.algebra.placement import Cut
from fgtp_pass.errors import AgreementError, ConfigError, DetectionError
from fgtp_pass.plan.plan import WeightCut
from fgtp_pass.vllm.marker_ops import (
    LAYERS,
    ShardedLayer,
    run,
    sum_of_cut,
    whole_embedding,
    whole_linear,
)
from fgtp_pass.vllm.meta_plan import Role, current_construction
from fgtp_pass.vllm.stretch import check_arrived
from fgtp_pass.vllm.work import Calls, rows_for_all


class _Part:
    """Stands for the tensor-parallel group while a layer is built: part `rank` of `size`."""

    def __init__(self, rank: int, size: int):
        self.rank_in_group = rank
        self.world_size = size


def _part(role: Role, replicated: bool) -> _Part:
    """replicated: each tensor-parallel rank of stock vLLM holds the whole layer."""
    construction = current_construction()
    assert construction is not None
    group, stock = construction.groups[role.group_size], parallel_state.get_tp_group()
    if replicated:
        return _Part(group.rank, group.size)
    return _Part(stock.rank_in_group * group.size + group.rank, stock.world_size * group.size)


def role_or_whole(layer: nn.Module, stock: type[nn.Module], args: Any, kwargs: Any) -> Role | None:
    """The role of a layer of class `stock` that is being built; without one it is built whole."""
    construction = current_construction()
    role = construction.role_of(layer) if construction is not None else None
    if role is None:
        layer.__class__ = stock  # vLLM compares types in places
        stock.__init__(layer, *args, **kwargs)
    return role


def build_shard(
    layer: nn.Module,
    stock: type[nn.Module],
    role: Role,
    args: Any,
    kwargs: Any,
    replicated: bool = False,
) -> None:
    """Build a layer as `stock` would, as this rank's shard."""
    with mock.patch.object(parallel_state, "_TP", _part(role, replicated)):
        stock.__init__(layer, *args, **kwargs)


def describe(
    layer: Any,
    role: Role,
    full: tuple[int, int],
    cut_dim: int,
    blocks: int = 1,
    replicated: bool = False,
) -> ShardedLayer:
    """Record how a layer was built. full: the shape of what its tensor-parallel rank would hold."""
    construction = current_construction()
    assert construction is not None
    group = construction.groups[role.group_size]
    expected = _part(role, replicated).world_size
    if layer.tp_size != expected:
        raise DetectionError(
            f"{role.weight.fqn} was built in {layer.tp_size} parts in place of {expected}: the "
            f"model opts this layer out of tensor parallelism. Leave {role.component} out of "
            "finegrained_tp_config."
        )
    if role.component != "embedding" and (cut_dim == 1) != (role.cut is Cut.IN):
        raise DetectionError(
            f"{role.weight.fqn} is to be cut along its {role.cut.value}puts, which a "
            f"{type(layer).__name__} does not do. Leave {role.component} out of "
            "finegrained_tp_config."
        )
    dtype = str(layer.params_dtype).removeprefix("torch.")
    weight = WeightCut(fqn=role.weight.fqn, shape=full, dtype=dtype, cut_dim=cut_dim, blocks=blocks)
    bias = None
    if role.bias is not None:
        cut_bias = cut_dim == 0
        bias = WeightCut(
            fqn=role.bias.fqn,
            shape=full[:1],
            dtype=dtype,
            cut_dim=0 if cut_bias else None,
            blocks=blocks if cut_bias else 1,
        )
    number = len(construction.built) - 1
    name = f"{role.component}.{number}"
    stretch = construction.stretch_of(role)
    sharded = ShardedLayer(name, role.component, role.cut, weight, bias, group, layer, stretch)
    LAYERS[name] = sharded
    return sharded


def _plain_weight(layer: Any) -> torch.Tensor | None:
    """The shard, where a plain matmul can take it; None where only the layer's kernel can."""
    if not isinstance(layer.quant_method, UnquantizedLinearMethod) or not layer.weight.numel():
        return None  # quantised, or packed by vLLM's CPU kernels
    weight: torch.Tensor = layer.weight
    return weight


class ShardedRowParallelLinear(RowParallelLinear):  # type: ignore[misc]
    """o_proj or down: [..., in] -> [..., out] with the inputs of its weight cut."""

    def __init__(self, *args: Any, **kwargs: Any):
        role = role_or_whole(self, RowParallelLinear, args, kwargs)
        if role is None:
            return
        build_shard(self, RowParallelLinear, role, args, kwargs)
        if not self.input_is_parallel:
            raise DetectionError(f"{role.weight.fqn} splits its own input, which cannot be cut.")
        tp = parallel_state.get_tp_group()
        self.adds_bias = not self.skip_bias_add and tp.rank_in_group == 0
        self._reduces = self.reduce_results and tp.world_size > 1
        inputs = self.input_size_per_partition * role.group_size
        self.fgtp = describe(self, role, (self.output_size, inputs), cut_dim=1)

    def forward(self, input_: torch.Tensor) -> Any:
        out = row_output(self, input_)
        if self._reduces:
            out = tensor_model_parallel_all_reduce(out)
        if not self.return_bias:
            return out
        return out, self.bias if self.skip_bias_add else None


def row_output(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """[..., in] -> [..., out], before tensor-parallel ranks add theirs. Without a graph, in an FFN,
    x holds this rank's features of all tokens of the group.
    """
    sharded, weight = layer.fgtp, _plain_weight(layer)
    bias = layer.bias if layer.adds_bias else None
    if torch.compiler.is_compiling():
        out: torch.Tensor = torch.ops.fgtp.linear(x, weight, bias, sharded.name, layer.output_size)
        return out
    if sharded.stretch is None:
        return whole_linear(sharded, x, weight, bias, layer.output_size)
    name, component = sharded.weight.fqn, sharded.component
    check_arrived(x, layer.input_size_per_partition, name, component)
    return sum_of_cut(sharded, x, weight, bias)


def finish_column(
    layer: Any, role: Role, output_sizes: list[int], replicated: bool = False
) -> None:
    """Describe a layer whose outputs are cut. output_sizes: of its parts, each cut by itself."""
    tp = parallel_state.get_tp_group()
    if layer.gather_output and tp.world_size > 1:
        raise DetectionError(f"{role.weight.fqn} gathers its output, which cannot be cut.")
    if layer.skip_bias_add and layer.bias is not None:
        raise DetectionError(f"{role.weight.fqn} hands its bias on, which cannot be cut.")
    alike = len(set(output_sizes)) == 1
    if not alike and role.component != "qkv":
        raise DetectionError(f"{role.weight.fqn} joins parts of different widths {output_sizes}.")
    outputs = layer.output_size_per_partition * role.group_size
    blocks = len(output_sizes) if alike else 1
    layer.fgtp = describe(layer, role, (outputs, layer.input_size), 0, blocks, replicated)
    layer.fgtp_parts = None if alike else layer.output_partition_sizes


def _part_by_part(x: torch.Tensor, group_size: int, widths: list[int]) -> torch.Tensor:
    """[..., features], rank by rank -> the same, part by part. widths: of a rank's parts."""
    by_rank = x.reshape(*x.shape[:-1], group_size, sum(widths))
    return torch.cat([part.flatten(-2) for part in torch.split(by_rank, widths, -1)], -1)


def column_output(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """[..., in] -> [..., out]. Without a graph, in an FFN, the result has this rank's features of
    all tokens of the group.
    """
    sharded, weight = layer.fgtp, _plain_weight(layer)
    features = sharded.weight.shape[0]
    out: torch.Tensor
    if torch.compiler.is_compiling():
        out = torch.ops.fgtp.linear(x, weight, layer.bias, sharded.name, features)
    elif sharded.stretch is None:
        out = whole_linear(sharded, x, weight, layer.bias, features)
    else:
        everyone = sharded.stretch.gather(run, sharded.group, x)
        out = sharded.on_shard(everyone, weight, layer.bias)
    if layer.fgtp_parts is not None:
        out = _part_by_part(out, sharded.group.size, layer.fgtp_parts)
    return out


def column_forward(layer: Any, x: torch.Tensor) -> Any:
    out = column_output(layer, x)
    return (out, None) if layer.return_bias else out


class ShardedColumnParallelLinear(ColumnParallelLinear):  # type: ignore[misc]
    """up: [..., in] -> [..., out] with the outputs of its weight cut."""

    def __init__(self, *args: Any, **kwargs: Any):
        role = role_or_whole(self, ColumnParallelLinear, args, kwargs)
        if role is not None:
            build_shard(self, ColumnParallelLinear, role, args, kwargs)
            finish_column(self, role, [self.output_size])

    def forward(self, input_: torch.Tensor) -> Any:
        return column_forward(self, input_)


class ShardedMergedColumnParallelLinear(MergedColumnParallelLinear):  # type: ignore[misc]
    """gate and up in one: [..., in] -> [..., 2*out], each of the two cut by itself."""

    def __init__(self, *args: Any, **kwargs: Any):
        role = role_or_whole(self, MergedColumnParallelLinear, args, kwargs)
        if role is not None:
            build_shard(self, MergedColumnParallelLinear, role, args, kwargs)
            finish_column(self, role, self.output_sizes)

    def forward(self, input_: torch.Tensor) -> Any:
        return column_forward(self, input_)


def _build_vocabulary(
    layer: Any, stock: type[nn.Module], role: Role, args: Any, kwargs: dict[str, Any]
) -> None:
    parts = _part(role, replicated=False).world_size
    padding = math.lcm(kwargs.get("padding_size", DEFAULT_VOCAB_PADDING_SIZE), parts)
    build_shard(layer, stock, role, args, kwargs | {"padding_size": padding})
    if role.component == "embedding" and not isinstance(
        layer.quant_method, UnquantizedEmbeddingMethod
    ):
        raise DetectionError(
            f"{role.weight.fqn} is a quantised table, which cannot be sharded. Leave embedding "
            "out of finegrained_tp_config."
        )
    rows = layer.num_embeddings_per_partition * role.group_size
    layer.fgtp = describe(layer, role, (rows, layer.embedding_dim), cut_dim=0)


class ShardedVocabParallelEmbedding(VocabParallelEmbedding):  # type: ignore[misc]
    """embedding: ids [...] -> [..., features] with the rows of its table cut."""

    def __init__(self, *args: Any, **kwargs: Any):
        role = role_or_whole(self, VocabParallelEmbedding, args, kwargs)
        if role is None:
            return
        _build_vocabulary(self, VocabParallelEmbedding, role, args, kwargs)
        tp = parallel_state.get_tp_group()
        self._first_row = tp.rank_in_group * self.fgtp.weight.shape[0]
        self._reduces = tp.world_size > 1
        self._outside = Calls(self.fgtp.group)

    def forward(self, input_: torch.Tensor) -> torch.Tensor:
        ids = input_.long()
        if self._first_row:
            ids = ids - self._first_row
        out: torch.Tensor
        if torch.compiler.is_compiling():
            out = torch.ops.fgtp.embedding(ids, self.weight, self.fgtp.name)
        elif is_forward_context_available():
            out = whole_embedding(self.fgtp, ids, self.weight)
        else:
            out = self._look_up_outside(ids)
        if self._reduces:
            out = tensor_model_parallel_all_reduce(out)
        return out

    def _look_up_outside(self, ids: torch.Tensor) -> torch.Tensor:
        """For a runner that embeds ids before it runs the model: [n], as many as this rank has."""
        own, work = ids.shape[0], self._outside.work
        if work is not None and self._outside.made:
            raise AgreementError(
                f"{self.fgtp.weight.fqn} is read outside the graph a second time in one step, "
                "which other ranks do not know of. Please report what was asked of the model."
            )
        rows = rows_for_all(own, work.lookups if work else None, "its embedding")
        self._outside.count()
        padded = torch.nn.functional.pad(ids, (0, rows - own))
        whole: torch.Tensor = whole_embedding(self.fgtp, padded, self.weight)
        return whole[:own]

    def take_part(self) -> None:
        """In what other ranks look up outside the graph in this step, once. Collective."""
        work = self._outside.work
        if work is not None and work.lookups and not self._outside.made:
            self._look_up_outside(torch.zeros(0, dtype=torch.long, device=self.weight.device))


class ShardedParallelLMHead(ParallelLMHead):  # type: ignore[misc]
    """lm_head: holds the cut weight; `logits.ShardedLogitsProcessor` applies it."""

    def __init__(self, *args: Any, **kwargs: Any):
        role = role_or_whole(self, ParallelLMHead, args, kwargs)
        if role is not None:
            _build_vocabulary(self, ParallelLMHead, role, args, kwargs)


LAYER_CLASSES: dict[str, type[nn.Module]] = {
    "RowParallelLinear": ShardedRowParallelLinear,
    "ColumnParallelLinear": ShardedColumnParallelLinear,
    "MergedColumnParallelLinear": ShardedMergedColumnParallelLinear,
    "VocabParallelEmbedding": ShardedVocabParallelEmbedding,
    "ParallelLMHead": ShardedParallelLMHead,
}


def register(classes: dict[str, type[nn.Module]]) -> None:
    """Put our classes in the place of vLLM's, once. Raises ConfigError if another plugin has."""
    for name, cls in classes.items():
        known = op_registry_oot.get(name)
        if known is cls:
            continue
        if known is not None:
            raise ConfigError(
                f"another plugin has replaced vLLM's {name} by {known.__module__}."
                f"{known.__qualname__}, and only one can. vllm-ascend shards such layers itself: "
                'there, leave "fgtp" out of passes.'
            )
        PluggableLayer.register_oot(name=name)(cls)

"""What makes queries, keys and values, born sharded: layers that only attention has.

Every rank gets all features of its own tokens back, so heads do not matter. vLLM's layer for q, k
and v, which is cut by heads, is built with k times as many of them, each 1/k as wide: its loaders
then cut each of the three by itself. Latents (MLA), which every tensor-parallel rank of vLLM holds
whole, are built as layers that are cut.
"""

import inspect
from typing import Any

from torch import nn
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
)
from vllm.model_executor.models.deepseek_v2 import DeepSeekV2FusedQkvAProjLinear

from fgtp_pass.errors import DetectionError
from fgtp_pass.vllm.born_sharded import (
    ShardedColumnParallelLinear,
    ShardedMergedColumnParallelLinear,
    build_shard,
    column_forward,
    finish_column,
    role_or_whole,
)
from fgtp_pass.vllm.meta_plan import Role


def _arguments(stock: type[nn.Module], args: Any, kwargs: Any) -> dict[str, Any]:
    """Those of `stock(*args, **kwargs)` by name."""
    bound = inspect.signature(stock.__init__).bind(None, *args, **kwargs)
    return dict(list(bound.arguments.items())[1:])


def _check_divides(role: Role, what: str, widths: list[int]) -> None:
    for width in widths:
        if width % role.group_size:
            raise DetectionError(
                f"{role.weight.fqn}: its {what} of width {width} cannot be cut in "
                f"{role.group_size}. Choose another qkv_tensor_parallel_size."
            )


class ShardedQKVParallelLinear(QKVParallelLinear):  # type: ignore[misc]
    """q, k and v in one: [..., in] -> [..., q + k + v]."""

    def __init__(self, *args: Any, **kwargs: Any):
        role = role_or_whole(self, QKVParallelLinear, args, kwargs)
        if role is None:
            return
        given = _arguments(QKVParallelLinear, args, kwargs)
        k, heads = role.group_size, given["total_num_heads"]
        kv_heads = given.get("total_num_kv_heads") or heads
        head, v_head = given["head_size"], given.get("v_head_size") or given["head_size"]
        _check_divides(role, "heads", [head, v_head])
        finer = {
            "total_num_heads": heads * k,
            "total_num_kv_heads": kv_heads * k,
            "head_size": head // k,
            "v_head_size": v_head // k,
        }
        build_shard(self, QKVParallelLinear, role, (), given | finer)
        finish_column(self, role, self.output_sizes)

    def forward(self, input_: Any) -> Any:
        return column_forward(self, input_)


class ShardedReplicatedLinear(ReplicatedLinear):  # type: ignore[misc]
    """A latent, or a projection to one: [..., in] -> [..., out]."""

    def __init__(self, *args: Any, **kwargs: Any):
        role = role_or_whole(self, ReplicatedLinear, args, kwargs)
        if role is None:
            return
        given = _arguments(ReplicatedLinear, args, kwargs)
        given.pop("disable_tp", None)
        _check_divides(role, "outputs", [given["output_size"]])
        self.__class__ = ShardedColumnParallelLinear  # which has loaders that cut
        build_shard(self, ColumnParallelLinear, role, (), given, replicated=True)
        finish_column(self, role, [given["output_size"]], replicated=True)


class ShardedLatents(DeepSeekV2FusedQkvAProjLinear):  # type: ignore[misc]
    """The latents of q, and of k and v, in one: [..., in] -> [..., q_a + kv_a]."""

    def __init__(self, *args: Any, **kwargs: Any):
        role = role_or_whole(self, DeepSeekV2FusedQkvAProjLinear, args, kwargs)
        if role is None:
            return
        given = _arguments(DeepSeekV2FusedQkvAProjLinear, args, kwargs)
        sizes = given.pop("output_size")
        _check_divides(role, "outputs", sizes)
        given |= {"output_sizes": sizes, "bias": False}
        self.__class__ = ShardedMergedColumnParallelLinear
        build_shard(self, MergedColumnParallelLinear, role, (), given, replicated=True)
        finish_column(self, role, sizes, replicated=True)


PROJECTION_CLASSES: dict[str, type[nn.Module]] = {
    "QKVParallelLinear": ShardedQKVParallelLinear,
    "ReplicatedLinear": ShardedReplicatedLinear,
    "DeepSeekV2FusedQkvAProjLinear": ShardedLatents,
}

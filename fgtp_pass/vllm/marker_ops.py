"""Marker ops: what a planned layer computes, in whole shapes, for the graph to see.

Where the pass finds no site around one, a marker does its own collectives, which is right but may
move more than the rewritten graph does. Without a graph the layers call what the markers stand for.
"""

from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F

from fgtp_pass.algebra.placement import Cut
from fgtp_pass.collectives import functional
from fgtp_pass.collectives.groups import ComponentGroup
from fgtp_pass.plan.plan import WeightCut
from fgtp_pass.rewrite.moves import cut_to_own, own_to_cut
from fgtp_pass.vllm.stretch import Stretch


@dataclass(eq=False)
class ShardedLayer:
    """How one layer is sharded, and what runs on its shard.

    weight: the cut of its full weight, [out, in] of this tensor-parallel rank. bias: its cut, or
    None. module: the vLLM layer, whose `quant_method` holds the shard. stretch: of the FFN that it
    is a part of, if that one runs in one stretch without a graph.
    """

    name: str
    component: str
    cut: Cut
    weight: WeightCut
    bias: WeightCut | None
    group: ComponentGroup
    module: torch.nn.Module
    stretch: Stretch | None = None

    def local_linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """[n, in of the shard] -> [n, out of the shard], with whatever kernel the layer has."""
        module: Any = self.module
        out: torch.Tensor = module.quant_method.apply(module, x, bias)
        return out

    def on_shard(
        self, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """The same. weight: the shard, where a plain matmul can take it."""
        return self.local_linear(x, bias) if weight is None else F.linear(x, weight, bias)


# by name: a marker finds its layer by it, in a graph that another process may have compiled too
LAYERS: WeakValueDictionary[str, ShardedLayer] = WeakValueDictionary()

_library: Any = torch.library.Library("fgtp", "DEF")  # type: ignore[no-untyped-call]
_library.define("linear(Tensor x, Tensor? weight, Tensor? bias, str layer, int features) -> Tensor")
_library.define("local_linear(Tensor x, Tensor? bias, str layer, int features) -> Tensor")
_library.define("embedding(Tensor ids, Tensor weight, str layer) -> Tensor")


def run(target: Any, *args: Any, **kwargs: Any) -> Any:
    return target(*args, **kwargs)


def whole_linear(
    sharded: ShardedLayer,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    features: int,
) -> torch.Tensor:
    """[..., in] of this rank's tokens -> [..., features], by the layer's own collectives."""
    group, flat = sharded.group, x.reshape(-1, x.shape[-1])
    rows = flat.shape[0]
    if sharded.cut is Cut.IN:
        mine = own_to_cut(run, group, flat, rows, sharded.weight)
        out = sum_of_cut(sharded, mine, weight, bias)
    else:
        cut = sharded.on_shard(functional.all_gather(run, group, flat), weight, bias)
        (out,) = cut_to_own(run, group, [cut], rows, [sharded.weight])
    whole: torch.Tensor = out.reshape(*x.shape[:-1], features)
    return whole


def _linear(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    layer: str,
    features: int,
) -> torch.Tensor:
    return whole_linear(LAYERS[layer], x, weight, bias, features)


def sum_of_cut(
    sharded: ShardedLayer,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Cut [k*rows, in/k] x W[in/k] -> Sum -rs-> Own [rows, out]."""
    group, partial = sharded.group, sharded.on_shard(x, weight, None)
    rows = partial.shape[0] // group.size
    out: torch.Tensor = functional.reduce_scatter(run, group, partial, rows, partial.shape[1])
    return out if bias is None else out + bias


def _linear_shape(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    layer: str,
    features: int,
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], features)


def _local_linear(
    x: torch.Tensor, bias: torch.Tensor | None, layer: str, features: int
) -> torch.Tensor:
    return LAYERS[layer].local_linear(x, bias)


def _local_linear_shape(
    x: torch.Tensor, bias: torch.Tensor | None, layer: str, features: int
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], features)


def whole_embedding(sharded: ShardedLayer, ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[...] ids of this rank's tokens -> [..., features]; zeros for ids in no rank's shard."""
    group, flat = sharded.group, ids.reshape(-1)
    every = functional.all_gather(run, group, flat)
    here = every - group.rank * weight.shape[0]
    mine = (here >= 0) & (here < weight.shape[0])
    found = F.embedding(torch.where(mine, here, 0), weight)
    partial = torch.where(mine.unsqueeze(-1), found, 0.0)
    out = functional.reduce_scatter(run, group, partial, flat.shape[0], weight.shape[1])
    whole: torch.Tensor = out.reshape(*ids.shape, weight.shape[1])
    return whole


def _embedding(ids: torch.Tensor, weight: torch.Tensor, layer: str) -> torch.Tensor:
    return whole_embedding(LAYERS[layer], ids, weight)


def _embedding_shape(ids: torch.Tensor, weight: torch.Tensor, layer: str) -> torch.Tensor:
    return weight.new_empty(*ids.shape, weight.shape[1])


for _name, _body, _shape in (
    ("linear", _linear, _linear_shape),
    ("local_linear", _local_linear, _local_linear_shape),
    ("embedding", _embedding, _embedding_shape),
):
    _library.impl(_name, _body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fgtp::{_name}", _shape, lib=_library)

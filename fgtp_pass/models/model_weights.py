"""The weights of a model that no component has: routed experts, other matmuls, and the rest."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from fgtp_pass.cost.model_summary import DraftLayers, RoutedExperts, Weights
from fgtp_pass.cost.quantization import Scheme, precision
from fgtp_pass.models.layer_stack import LayerStack

# what configs and modules call the number of experts that a token is sent to
_ACTIVE = (
    *("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_top_k"),
    *("moe_k", "top_k"),
)


@dataclass(frozen=True)
class OtherWeights:
    """See the fields of the same names of `ModelSummary`."""

    linears: Weights
    replicated: Weights
    experts: RoutedExperts | None
    vectors: int


@dataclass(frozen=True)
class _Named:
    fqn: str
    module: nn.Module
    shape: tuple[int, ...]

    @property
    def is_expert(self) -> bool:
        return len(self.shape) == 3 and not isinstance(self.module, nn.modules.conv._ConvNd)

    @property
    def is_matmul(self) -> bool:
        return len(self.shape) == 2 and not isinstance(self.module, nn.Embedding)


def other_weights(
    model: nn.Module, cut: Iterable[str], dtype: str, scheme: Scheme | None
) -> OtherWeights:
    """All parameters but those that components cut, sorted by what is done with them.

    cut: names of parameters of the plan. dtype: the model's. Tied parameters count once.
    """
    taken = set(cut)
    named = [one for one in _named(model) if one.fqn not in taken]
    experts = [one for one in named if one.is_expert]
    count = max((one.shape[0] for one in experts), default=0)
    latents = _latent_widths(model.config)
    matmuls = [one for one in named if one.is_matmul]
    whole = [one for one in matmuls if one.shape[0] in {*latents, count, 1}]
    inner = {id(one) for one in whole}
    rest = sum(_numel(one) for one in named) - sum(map(_numel, [*experts, *matmuls]))
    return OtherWeights(
        linears=_weights([one for one in matmuls if id(one) not in inner], dtype, scheme),
        replicated=_weights(whole, dtype, scheme),
        experts=_routed(model, experts, count, dtype, scheme),
        vectors=rest,
    )


def _named(model: nn.Module) -> Iterator[_Named]:
    modules = dict(model.named_modules())
    for fqn, parameter in model.named_parameters():
        yield _Named(fqn, modules[fqn.rpartition(".")[0]], tuple(parameter.shape))


def _latent_widths(text: Any) -> set[int]:
    """Widths of projections into MLA's latents, which tensor parallelism leaves whole."""
    query, latent = (getattr(text, name, None) for name in ("q_lora_rank", "kv_lora_rank"))
    if not latent:
        return set()
    latent += getattr(text, "qk_rope_head_dim", 0)
    return {latent} | ({query, query + latent} if query else set())


def _routed(
    model: nn.Module, experts: list[_Named], count: int, dtype: str, scheme: Scheme | None
) -> RoutedExperts | None:
    if not experts:
        return None
    return RoutedExperts(
        layers=len({one.module for one in experts}),
        count=count,
        active=min(count, _active(model)),
        weights=_weights(experts, dtype, scheme),
    )


def _active(model: nn.Module) -> int:
    """Experts that a token is sent to, as the config or the model's routers say; 1 if none does."""
    for owner in (model.config, *model.modules()):
        for name in _ACTIVE:
            found = getattr(owner, name, None)
            if isinstance(found, int) and not isinstance(found, bool) and found > 0:
                return found
    return 1


def _weights(named: Iterable[_Named], dtype: str, scheme: Scheme | None) -> Weights:
    elements, declared = 0, 0.0
    by_dtype: Counter[str] = Counter()
    for one in named:
        kept = precision(dtype, scheme, one.fqn.rpartition(".")[0])
        elements += _numel(one)
        declared += _numel(one) * kept.element_bytes
        by_dtype[kept.matmul_dtype] += _numel(one)
    most = by_dtype.most_common(1)
    return Weights(
        elements=elements, declared_bytes=declared, declared_dtype=most[0][0] if most else None
    )


def _numel(one: _Named) -> int:
    return math.prod(one.shape)


def draft_layers(
    model: nn.Module, stack: LayerStack | None, dtype: str, scheme: Scheme | None
) -> DraftLayers | None:
    """The layers for multi-token prediction that a config declares; transformers builds none.

    As DeepSeek-V3 has them: a decoder layer like the last, and a projection of two hidden states
    into one; embedding and lm_head are the model's.
    """
    text: Any = model.config
    layers = int(getattr(text, "num_nextn_predict_layers", None) or 0)
    if not layers or stack is None:
        return None
    last = f"{stack.prefix}{len(stack.layers) - 1}."
    named = [one for one in _named(model) if one.fqn.startswith(last)]
    experts = _weights([one for one in named if one.is_expert], dtype, scheme)
    linears = _weights([one for one in named if one.is_matmul], dtype, scheme)
    joined = 2 * int(text.hidden_size) ** 2
    kept = precision(dtype, scheme, "eh_proj").element_bytes
    return DraftLayers(
        layers=layers,
        linears=Weights(
            elements=layers * (linears.elements + joined),
            declared_bytes=layers * (linears.declared_bytes + joined * kept),
            declared_dtype=linears.declared_dtype,
        ),
        experts=Weights(
            elements=layers * experts.elements,
            declared_bytes=layers * experts.declared_bytes,
            declared_dtype=experts.declared_dtype,
        ),
    )

"""What a model's layers keep of a sequence: a step is run on the meta device, and its cache read.

transformers' own cache knows every kind of layer: keys and values by head, sliding and chunked
windows, latents, an indexer's keys, convolution and recurrent states. Running the model fills it,
so nothing is taken from names in a config but for what MLA multiplies.
"""

import inspect
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from fgtp_pass import dynamo
from fgtp_pass.cost.model_summary import AttentionKind
from fgtp_pass.errors import first_line
from fgtp_pass.models.layer_stack import LayerStack

# What grows with tokens is kept per token. Caches that keep one entry for several tokens (4 and 128
# in DeepSeek-V4) have whole ones at both lengths.
_SHORT, _LONG = 128, 256


def attention_kinds(
    model: nn.Module, stack: LayerStack | None
) -> tuple[tuple[AttentionKind, ...], str | None]:
    """The kinds of attention of a model on the meta device, and None or why they are assumed.

    Where the model cannot be run this way, all layers are taken to keep the config's KV heads.
    """
    text: Any = model.config
    try:
        # one layer of each kind is enough, unless layers share what they keep
        caches, layers = _filled_caches(model, stack, stack.firsts if stack else None)
    except Exception:  # whatever a model's code does without its other layers
        try:
            caches, layers = _filled_caches(model, stack, None)
        except Exception as error:  # or on the meta device
            return (assumed_kind(text),), first_line(error)
    found: dict[AttentionKind, int] = {}
    for number, count in layers.items():
        if number >= len(caches[0].layers):
            continue  # a layer that reads the cache of another
        short, long = (cache.layers[number] for cache in caches)
        for kind in _layer_kinds(short, long, text):
            found[kind] = found.get(kind, 0) + count
    if not found:
        return (assumed_kind(text),), "the model put nothing into its cache"
    return tuple(kind.model_copy(update={"layers": n}) for kind, n in found.items()), None


def assumed_kind(text: Any) -> AttentionKind:
    """Attention over a config's KV heads, or its latent, in every layer."""
    heads = int(getattr(text, "num_attention_heads", None) or 1)
    latent = getattr(text, "kv_lora_rank", None)
    if latent:
        key, value, kv_heads = latent, text.qk_rope_head_dim, 1
    else:
        kv_heads = int(getattr(text, "num_key_value_heads", None) or heads)
        key = value = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
    decode, prefill = _flops(text, kv_heads, key, value)
    return AttentionKind(
        layers=int(text.num_hidden_layers),
        heads=kv_heads,
        width=kv_heads * (key + value),
        decode_flops=decode,
        prefill_flops=prefill,
    )


def _filled_caches(
    model: nn.Module, stack: LayerStack | None, only: list[int] | None
) -> tuple[list[Any], dict[int, int]]:
    """Caches of a short and of a long sequence, and for how many layers of the model each of the
    cache's layers stands. only: the decoder layers to run, None for all.
    """
    caches = []
    config: Any = model.config
    with ExitStack() as during:
        during.enter_context(torch.no_grad())
        during.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        during.enter_context(dynamo.meta_nonzero())
        during.enter_context(_without_experts(model))
        if stack is not None and only is not None:
            during.enter_context(stack.only(only))
        for tokens in (_SHORT, _LONG):
            cache = DynamicCache(config=config)
            ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
            model(input_ids=ids, use_cache=True, **{_cache_argument(model): cache})
            caches.append(cache)
    if stack is None:
        return caches, dict.fromkeys(range(len(caches[0].layers)), 1)
    layers: dict[int, int] = {}
    for number in range(len(stack.layers)) if only is None else only:
        alike = 1 if only is None else stack.kinds.count(stack.kinds[number])
        for at in _cache_numbers(stack.layers[number], number):
            layers[at] = layers.get(at, 0) + alike
    return caches, layers


def _cache_argument(model: nn.Module) -> str:
    taken = inspect.signature(model.forward).parameters
    return "past_key_values" if "past_key_values" in taken else "cache_params"


def _cache_numbers(layer: nn.Module, number: int) -> set[int]:
    """The layers of the cache that a decoder layer fills: its own, or one for each attention."""
    said = {vars(module).get("layer_idx") for module in layer.modules()}
    return {one for one in said if isinstance(one, int)} or {number}


@contextmanager
def _without_experts(model: nn.Module) -> Iterator[None]:
    """The model with experts that hand on what they get: which are chosen depends on data."""
    experts = [m for m in model.modules() if any(p.dim() == 3 for p in m.parameters(False))]
    experts = [module for module in experts if not isinstance(module, nn.modules.conv._ConvNd)]
    for module in experts:
        module.forward = lambda hidden, *_, **__: hidden
    try:
        yield
    finally:
        for module in experts:
            del module.forward


def _layer_kinds(short: Any, long: Any, text: Any) -> Iterator[AttentionKind]:
    """What one layer keeps, from two filled caches: attention, what else grows, states."""
    keys, values = getattr(short, "keys", None), getattr(short, "values", None)
    others, longer = dict(_tensors(short)), dict(_tensors(long))
    grown = {name: longer[name].numel() - one.numel() for name, one in others.items()}
    states = sum(one.nbytes for name, one in others.items() if one.dim() > 1 and not grown[name])
    if isinstance(keys, torch.Tensor) and isinstance(values, torch.Tensor) and keys.dim() == 4:
        # Falcon copies its KV heads before it caches them; engines keep each once
        heads = min(keys.shape[1], int(getattr(text, "num_kv_heads", None) or keys.shape[1]))
        width = heads * (keys.shape[-1] + (0 if values is keys else values.shape[-1]))
        decode, prefill = _flops(text, heads, keys.shape[-1], values.shape[-1])
        sparse = "indexer_keys" in others
        yield AttentionKind(
            layers=0,
            heads=heads,
            width=width,
            window=_window(short),
            reads=getattr(text, "index_topk", None) if sparse else None,
            state_bytes=states,
            decode_flops=decode,
            prefill_flops=prefill,
        )
    elif states:
        yield AttentionKind(layers=0, state_bytes=states)
    for name, count in grown.items():
        if count > 0:
            query_heads = int(getattr(text, "index_n_heads", None) or 1)
            flops = 2 * query_heads * others[name].shape[-1]
            width = -(-count // (_LONG - _SHORT))
            yield AttentionKind(layers=0, width=width, decode_flops=flops, prefill_flops=flops)


def _window(layer: Any) -> int | None:
    window = getattr(layer, "sliding_window", None)
    return int(window) if window else None


def _flops(text: Any, kv_heads: int, key: int, value: int) -> tuple[int, int]:
    """FLOPs per query token and token that it attends to, in decode and in prefill.

    MLA decodes in its latent space, where keys are the whole latent and values all of it but the
    rotary part; it prefills with the heads' own keys and values.
    """
    heads = int(getattr(text, "num_attention_heads", None) or kv_heads)
    latent = getattr(text, "kv_lora_rank", None)
    if latent and kv_heads == 1:
        query = int(text.qk_nope_head_dim) + int(text.qk_rope_head_dim)
        return 2 * heads * (key + value + latent), 2 * heads * (query + int(text.v_head_dim))
    return 2 * heads * (key + value), 2 * heads * (key + value)


def _tensors(layer: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor that a cache layer holds beside its keys and values, by name."""
    for name, value in vars(layer).items():
        if name in ("keys", "values"):
            continue
        held = value.items() if isinstance(value, Mapping) else [("", value)]
        for key, one in held:
            if isinstance(one, torch.Tensor):
                yield f"{name}.{key}".rstrip("."), one

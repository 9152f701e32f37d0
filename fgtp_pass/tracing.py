"""How a config.json becomes a plan: build on the meta device, trace each kind of layer once."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from fgtp_pass.errors import ConfigError, FgtpError
from fgtp_pass.layers import LayerStack, expand, find_layers, only_layer
from fgtp_pass.patterns import BUILTIN
from fgtp_pass.plan import Plan
from fgtp_pass.planning import make_plan, snapshot_graphs
from fgtp_pass.summary import ComponentKey, ModelSummary

_TRACED_RANKS = 2  # any size > 1: neither sites nor paths depend on it

Progress = Callable[[str], None]


def build(config: Mapping[str, Any]) -> nn.Module:
    """The causal language model of a config.json, on the meta device, in its dtype.

    Raises ConfigError for a config that transformers cannot build.
    """
    given = {k: v for k, v in config.items() if k not in ("quantization_config", "auto_map")}
    model_type = given.pop("model_type", None)
    if model_type not in CONFIG_MAPPING:
        raise ConfigError(f"transformers knows no model_type {model_type!r}")
    from_config: Any = AutoModelForCausalLM.from_config
    try:
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            parsed = CONFIG_MAPPING[model_type].from_dict(given).get_text_config()
            model: nn.Module = from_config(parsed)
    except Exception as error:  # whatever a wrong value makes transformers raise
        raise ConfigError(f"transformers cannot build this config: {_said(error)}") from None
    dtype = str(getattr(parsed, "dtype", None) or "bfloat16").removeprefix("torch.")
    return model.to(getattr(torch, dtype)).eval().requires_grad_(False)


def trace_summary(name: str, config: Mapping[str, Any], progress: Progress) -> ModelSummary:
    """The summary of the model that a config.json describes; see `ModelSummary`.

    Raises ConfigError for a config that cannot be built, traced or planned.
    """
    progress("building the model without weights")
    model = build(config)
    plan = plan_model(model, progress)
    cut = {weight.fqn for site in plan.sites for weight in site.weights}
    rest = [p for fqn, p in model.named_parameters() if fqn not in cut]
    text: Any = model.config
    heads = int(text.num_attention_heads)
    kv_heads = int(getattr(text, "num_key_value_heads", None) or heads)
    head_dim = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
    latent = getattr(text, "kv_lora_rank", None)
    return ModelSummary(
        name=name,
        architecture=type(model).__name__,
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        layers=int(text.num_hidden_layers),
        attention_heads=heads,
        kv_heads=kv_heads,
        kv_width=latent + text.qk_rope_head_dim if latent else 2 * kv_heads * head_dim,
        latent=bool(latent),
        quantization=declared_quantization(config),
        experts=sum(p.numel() for p in rest if p.dim() == 3),
        linears=sum(p.numel() for p in rest if p.dim() == 2),
        others=sum(p.numel() for p in rest if p.dim() != 3),
        keys=tuple(
            ComponentKey(component=p.component, config_key=p.config_key, aliases=p.aliases)
            for p in BUILTIN
        ),
        plan=plan,
    )


def declared_quantization(config: Mapping[str, Any]) -> str | None:
    """The scheme that a config declares, in the words of `fgtp_pass.cost.shape`, or its own."""
    declared = config.get("quantization_config") or {}
    method = declared.get("quant_method")
    if method in ("awq", "gptq"):
        return f"w{declared.get('bits', 4)}a16"
    return str(method) if method else None


def plan_model(model: nn.Module, progress: Progress = lambda _: None) -> Plan:
    """The plan of all components over two ranks, each kind of layer traced once.

    Raises ConfigError where Dynamo cannot trace the model, or finds nothing to plan.
    """
    stack = find_layers(model)
    with _as_config_errors():
        if stack is None:
            return _plan(model, _TRACED_RANKS)
        progress(f"tracing {len(stack.firsts)} kinds of layers")
        with stack.only(stack.firsts):
            traced = _plan(model, _TRACED_RANKS)
    return expand(traced, stack)


@dataclass(frozen=True)
class ExplainedLayer:
    """One decoder layer: the plan of its parameters, and its graph before and after as text.

    The graphs also hold what stands around a model's layers, since that is how Dynamo sees it.
    """

    name: str
    plan: Plan
    before: str
    after: str


def explain_layer(
    config: Mapping[str, Any], layer: int, size: int, progress: Progress
) -> ExplainedLayer:
    """What the pass does to decoder layer number `layer`, with all components over `size` ranks.

    Raises ConfigError as `trace_summary` does, and for a layer that the model does not have.
    """
    progress("building the model without weights")
    model = build(config)
    stack: LayerStack | None = find_layers(model)
    if stack is None or layer >= len(stack.layers):
        count = len(stack.layers) if stack else 0
        raise ConfigError(f"there is no layer {layer}: the model has {count}, from 0 on")
    progress(f"tracing layer {layer}")
    with stack.only([layer]), _as_config_errors():
        plan = _plan(model, size)
        (graph, *_) = snapshot_graphs(model, kwargs=_call(), data_parallel_size=size)
    first, name = f"{stack.prefix}0.", f"{stack.prefix}{layer}"
    before, after = (text.replace(first, f"{name}.") for text in (graph.before, graph.after))
    return ExplainedLayer(name, only_layer(plan, stack, layer), before, after)


def _plan(model: nn.Module, size: int) -> Plan:
    torch.compiler.reset()
    return make_plan(model, kwargs=_call(), data_parallel_size=size)


def _call() -> dict[str, Any]:
    """A decode step of four sequences."""
    ids = torch.zeros(4, 1, dtype=torch.long, device="meta")
    return {"input_ids": ids, "use_cache": False}


@contextmanager
def _as_config_errors() -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except FgtpError as error:
        raise ConfigError(f"this model cannot be planned: {error}") from None
    except Exception as error:  # whatever Dynamo meets in a model's code
        raise ConfigError(f"this model cannot be traced: {_said(error)}") from None


def _said(error: Exception) -> str:
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first}"

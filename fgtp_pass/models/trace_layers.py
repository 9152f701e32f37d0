"""How a config.json becomes a plan: build on the meta device, trace each kind of layer once."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fgtp_pass import dynamo
from fgtp_pass.cost.model_summary import JOINED, ComponentKey, ModelSummary
from fgtp_pass.dry_run.make_plan import make_plan
from fgtp_pass.dry_run.trace import trace
from fgtp_pass.errors import ConfigError, FgtpError, first_line
from fgtp_pass.models.attention_cache import attention_kinds
from fgtp_pass.models.declared import declared_cache_dtype, declared_scheme
from fgtp_pass.models.layer_stack import expand, find_layers
from fgtp_pass.models.meta_model import build
from fgtp_pass.models.model_weights import draft_layers, other_weights
from fgtp_pass.patterns import BUILTIN
from fgtp_pass.plan.plan import Plan, merge
from fgtp_pass.plan.planner import plan_graph

_TRACED_RANKS = 2  # any size > 1: neither sites nor paths depend on it


Progress = Callable[[str], None]


def trace_summary(name: str, config: Mapping[str, Any], progress: Progress) -> ModelSummary:
    """The summary of the model that a config.json describes; see `ModelSummary`.

    Raises ConfigError for a config that cannot be built, traced or planned.
    """
    progress("building the model without weights")
    model = build(config)
    stack = find_layers(model)
    plan, joined = plan_model(model, progress)
    progress("reading what its layers keep of a sequence")
    kinds, assumed = attention_kinds(model, stack)
    text: Any = model.config
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    scheme = declared_scheme(config)
    rest = other_weights(model, plan.cuts(), dtype, scheme)
    heads = int(getattr(text, "num_attention_heads", None) or 0)
    return ModelSummary(
        name=name,
        architecture=type(model).__name__,
        model_type=str(config["model_type"]),
        dtype=dtype,
        layers=int(text.num_hidden_layers),
        hidden=int(text.hidden_size),
        vocabulary=int(text.vocab_size),
        attention_heads=heads,
        kv_heads=max((kind.heads for kind in kinds), default=0) if heads else 0,
        attention=kinds,
        cache_assumed=assumed,
        latent=bool(getattr(text, "kv_lora_rank", None)),
        scheme=scheme,
        cache_dtype=declared_cache_dtype(config),
        experts=rest.experts,
        linears=rest.linears,
        replicated=rest.replicated,
        vectors=rest.vectors,
        draft=draft_layers(model, stack, dtype, scheme),
        keys=tuple(
            ComponentKey(
                component=p.component,
                config_key=p.config_key,
                aliases=p.aliases,
                opt_in=p.opt_in,
            )
            for p in BUILTIN
        ),
        plan=plan,
        joined=joined,
    )


def plan_model(model: nn.Module, progress: Progress = lambda _: None) -> tuple[Plan, Plan | None]:
    """The plan of all components over two ranks, each kind of layer traced once.

    Its sites share no stretch, as each component may be on or off. Also that of `JOINED` in one
    size, where sites that touch share stretches; None if none do. Raises ConfigError where Dynamo
    cannot trace the model, or finds nothing to plan.
    """
    stack = find_layers(model)
    with as_config_errors():
        if stack is None:
            return _plans(model)
        progress(f"tracing {len(stack.traced)} of {len(stack.layers)} layers")
        with stack.only(stack.traced):
            plan, joined = _plans(model)
    return expand(plan, stack), None if joined is None else expand(joined, stack)


def _plans(model: nn.Module) -> tuple[Plan, Plan | None]:
    torch.compiler.reset()
    sizes = {pattern.component: _TRACED_RANKS for pattern in BUILTIN}
    traced = trace(model, (), decode_call(), sizes, _TRACED_RANKS, (), joins=False)
    apart = merge(graph.plan for _, graph in traced)
    assert apart is not None
    pair = dict.fromkeys(JOINED, _TRACED_RANKS)
    joined = [plan_graph(graph.detection, pair, _TRACED_RANKS) for _, graph in traced]
    shares = any(graph.beside or graph.behind for graph in joined)
    return apart, merge(graph.plan for graph in joined) if shares else None


def traced_plan(model: nn.Module, size: int) -> Plan:
    torch.compiler.reset()
    return make_plan(model, kwargs=decode_call(), data_parallel_size=size)


def decode_call() -> dict[str, Any]:
    """A decode step of four sequences."""
    ids = torch.zeros(4, 1, dtype=torch.long, device="meta")
    return {"input_ids": ids, "use_cache": False}


@contextmanager
def as_config_errors() -> Iterator[None]:
    """What goes wrong while a model is traced, as one sentence."""
    try:
        with warnings.catch_warnings(), dynamo.meta_nonzero():
            warnings.simplefilter("ignore")
            yield
    except FgtpError as error:
        raise ConfigError(f"this model cannot be planned: {error}") from None
    except Exception as error:  # whatever Dynamo meets in a model's code
        said = first_line(error)
        if "meta tensor" in said:
            raise ConfigError(
                "this model cannot be planned without weights: its code looks at values of "
                f"tensors while it runs, such as which experts are chosen ({said})"
            ) from None
        raise ConfigError(f"this model cannot be traced: {said}") from None

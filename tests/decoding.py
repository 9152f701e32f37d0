"""What a rank does in numeric tests: its own prompts, unsharded and sharded."""

from typing import Any

import torch
import torch.distributed as dist
import zoo
from torch import nn
from transformers import DynamicCache, StaticCache

import fgtp_pass
from fgtp_pass import fgtp_backend

DECODE_STEPS = 8


def sizes(k: int | None = None, **by_component: int) -> dict[str, int]:
    """A finegrained_tp_config: the four usual components at k, or the given ones."""
    chosen = by_component or dict.fromkeys(zoo.COMPONENTS, k)
    return {f"{component}_tensor_parallel_size": size for component, size in chosen.items()}


def prompts(rank: int, batch: int, length: int, vocabulary: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * length + rank)
    return torch.randint(0, vocabulary, (batch, length), generator=generator)


@torch.no_grad()
def decode(
    model: Any,
    ids: torch.Tensor,
    steps: int,
    tokens: torch.Tensor | None = None,
    static: bool = False,
    marked: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prefill and greedy steps with a cache; logits [steps + 1, batch, vocabulary] and tokens.

    With `tokens` these are fed in place of the model's own, so that errors do not compound.
    With `marked`, Dynamo is told that the cache grows. Else it traces the first step for its length
    alone, and the second again for every length, as it does for users.
    """
    config = getattr(model, "_orig_mod", model).config
    length = ids.shape[1]
    cache = (
        StaticCache(config=config, max_cache_len=length + steps + 1)
        if static
        else DynamicCache(config=config)
    )
    extra = {}
    if static and config.model_type == "bloom":  # its alibi needs the length of the cache
        extra["attention_mask"] = torch.ones(ids.shape[0], length + steps + 1, dtype=torch.long)
    out = model(input_ids=ids, past_key_values=cache, use_cache=True, **extra)
    logits = [out.logits[:, -1].float()]
    if marked and not static:
        _mark_length(cache)
    chosen = []
    for step in range(steps):
        best = logits[-1].argmax(-1, keepdim=True)
        chosen.append(best)
        fed = best if tokens is None else tokens[step]
        out = model(input_ids=fed, past_key_values=cache, use_cache=True, **extra)
        logits.append(out.logits[:, -1].float())
    return torch.stack(logits), torch.stack(chosen) if chosen else torch.empty(0)


def _mark_length(cache: DynamicCache) -> None:
    for layer in cache.layers:
        for kind in ("keys", "values"):  # [batch, heads, length, head width]; a mixer has none
            states = getattr(layer, kind, None)
            if states is not None:
                torch._dynamo.maybe_mark_dynamic(states, 2)


def relative_errors(got: torch.Tensor, want: torch.Tensor) -> tuple[float, float]:
    """(max error relative to the largest value, RMS error relative to the RMS)."""
    difference = (got - want).float()
    largest = difference.abs().max() / want.float().abs().max()
    rms = difference.pow(2).mean().sqrt() / want.float().pow(2).mean().sqrt()
    return float(largest), float(rms)


def compare_with_unsharded(
    name: str,
    config: dict[str, int],
    dtype: str = "float32",
    inner: str = "eager",
    lengths: tuple[int, ...] = (5,),
    steps: int = DECODE_STEPS,
    static: bool = False,
    marked: bool = True,
    tokens: str = "equal",
    attention: str = "sdpa",
    allow_missing: tuple[str, ...] = (),
    device: str = "cpu",
    **build: Any,
) -> dict[str, Any]:
    """Largest errors of the sharded model over prefills and decode steps, and its plan.

    Time goes into tracing: prefill one graph, the decode steps one (two if not `marked`), and a
    second length one more.
    """
    rank = dist.get_rank()
    model: nn.Module = zoo.build(
        name, dtype=getattr(torch, dtype), attn_implementation=attention, device=device, **build
    )
    runs = []
    for i, length in enumerate(lengths):
        # ragged: every rank has its own batch and length
        batch = 2 + (rank + i) % 2 if tokens == "ragged" else 2
        own = length + (3 * rank if tokens == "ragged" else 0)
        ids = prompts(rank, batch, own, model.config.vocab_size).to(device)
        runs.append((ids, *decode(model, ids, steps, static=static)))
    fast = torch.compile(
        model,
        backend=fgtp_backend,
        options={
            "finegrained_tp_config": config,
            "inner_backend": inner,
            "tokens": tokens,
            "allow_missing": allow_missing,
        },
    )
    worst, worst_rms, same = 0.0, 0.0, True
    for ids, want, chosen in runs:
        got, tokens_got = decode(fast, ids, steps, tokens=chosen, static=static, marked=marked)
        largest, rms = relative_errors(got, want)
        worst, worst_rms = max(worst, largest), max(worst_rms, rms)
        same = same and torch.equal(tokens_got, chosen)
    plan = fgtp_pass.applied_plan(fast)
    assert plan is not None
    return {"max": worst, "rms": worst_rms, "same_tokens": same, "plan": plan.to_json()}

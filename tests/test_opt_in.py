"""Shared experts and q, k, v: with the four usual components, against the unsharded model."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
import zoo
from decoding import compare_with_unsharded, prompts, relative_errors, sizes
from marks import typical
from ranks import Pools
from test_detection import missing
from torch import nn

import fgtp_pass
from fgtp_pass import fgtp_backend
from fgtp_pass.collectives import functional

SIX = (*zoo.COMPONENTS, *zoo.OPT_IN)
ARCHITECTURES = (
    *("qwen2_moe", "deepseek_v2", "deepseek_v3", "llama4"),  # shared experts
    *("llama", "qwen3", "gemma3", "gpt2", "bloom", "falcon", "phi", "cohere", "olmo2"),
)


def six(k: int = 2, **other: int) -> dict[str, int]:
    return sizes(**dict.fromkeys(SIX, k) | other)


@pytest.mark.parametrize("name", typical(ARCHITECTURES, "deepseek_v2", "qwen2_moe"))
def test_two_ranks_fp32(ranks: Pools, name: str) -> None:
    absent = missing(name, SIX)
    for result in ranks(2).run(compare_with_unsharded, name, six(), allow_missing=absent):
        assert result["max"] <= 1e-5
        assert result["same_tokens"]
        for component in set(SIX) - set(absent):
            assert f'"{component}"' in result["plan"]


def test_two_ranks_bf16(ranks: Pools) -> None:
    call = {"dtype": "bfloat16", "seed": 2, "steps": 1}  # weights with which no expert is a tie
    for result in ranks(2).run(compare_with_unsharded, "qwen2_moe", six(), **call):
        assert result["rms"] <= 0.02


def test_two_ranks_inductor(ranks: Pools) -> None:
    call = {"inner": "inductor", "steps": 0}
    for result in ranks(2).run(compare_with_unsharded, "deepseek_v2", six(), **call):
        assert result["max"] <= 1e-5


def test_four_ranks(ranks: Pools) -> None:
    config = six(4, qkv=2, mlp=2, lmhead=2)
    for result in ranks(4).run(compare_with_unsharded, "deepseek_v3", config, steps=1):
        assert result["max"] <= 1e-5


@pytest.mark.parametrize("name", ["deepseek_v2", "qwen2_moe"])
def test_ragged(ranks: Pools, name: str) -> None:
    call = {"tokens": "ragged", "lengths": (5, 8), "steps": 1}
    for result in ranks(2).run(compare_with_unsharded, name, six(), **call):
        assert result["max"] <= 1e-5


@torch.no_grad()
def _idle_and_back() -> None:
    """Rank 1 idles in one step of two; afterwards the weights are what they were, bit for bit."""
    model = zoo.build("deepseek_v2")
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    fast = torch.compile(
        model,
        backend=fgtp_backend,
        options={"finegrained_tp_config": six(), "inner_backend": "eager"},
    )
    rank = dist.get_rank()
    for i in range(4):
        ids = prompts(rank, 2, 5 + i, model.config.vocab_size)
        if rank == 1 and i % 2:
            fgtp_pass.idle_step(fast)
            continue
        want = model(input_ids=ids).logits if i == 0 else None
        got = fast(input_ids=ids).logits
        if want is not None:
            assert relative_errors(got, want)[0] <= 1e-5
    plan = fgtp_pass.applied_plan(fast)
    assert plan is not None
    shards = fgtp_pass.shard_state_dict(fast)
    cut = [w for s in plan.sites if s.component in zoo.OPT_IN for w in s.weights]
    assert {zoo.categorize(w.fqn.removeprefix("_orig_mod.")) for w in cut} == set(zoo.OPT_IN)
    for weight in cut:
        assert shards[weight.fqn].shape == weight.shard_shape(2)
    fgtp_pass.unshard(fast)
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name]), name


def test_idle_ranks_and_unshard(ranks: Pools) -> None:
    ranks(2).run(_idle_and_back)


class _Adapted(nn.Module):
    """A linear with a low-rank adapter, as PEFT wraps it."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.Linear(base.in_features, 4, bias=False)
        self.lora_B = nn.Linear(4, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x)) * 0.5


@torch.no_grad()
def _with_adapters() -> tuple[float, str]:
    torch.manual_seed(0)
    model: Any = zoo.build("llama")
    for layer in model.model.layers:
        for name in ("q_proj", "v_proj", "o_proj"):
            setattr(layer.self_attn, name, _Adapted(getattr(layer.self_attn, name)))
    last = model.model.layers[-1].mlp
    last.down_proj = _Adapted(last.down_proj)
    ids = prompts(dist.get_rank(), 2, 5, model.config.vocab_size)
    want = model(input_ids=ids).logits
    options = {"finegrained_tp_config": six(), "allow_missing": ["sharedexpert"]}
    fast = torch.compile(model, backend=fgtp_backend, options={"inner_backend": "eager", **options})
    error = relative_errors(fast(input_ids=ids).logits, want)[0]
    plan = fgtp_pass.applied_plan(fast)
    assert plan is not None
    return error, plan.to_json()


def test_low_rank_adapters_stay_whole_and_their_base_is_cut(ranks: Pools) -> None:
    for error, text in ranks(2).run(_with_adapters):
        assert error <= 1e-5
        plan = fgtp_pass.Plan.from_json(text)
        cut = [weight.fqn for site in plan.sites for weight in site.weights]
        assert not [fqn for fqn in cut if "lora" in fqn]
        for name in ("q_proj.base_layer", "k_proj", "v_proj.base_layer", "o_proj.base_layer"):
            assert sum(fqn.endswith(f"self_attn.{name}.weight") for fqn in cut) == 2
        why = {left.fqn: left.reason for left in plan.left_alone}
        assert "a low-rank adapter" in why["model.layers.0.self_attn.q_proj.lora_A.weight"]
        assert (
            "a low-rank adapter is added" in why["model.layers.1.mlp.down_proj.base_layer.weight"]
        )
        assert "model.layers.0.mlp.down_proj.weight" in cut


def _added_once_more() -> dict[str, Any]:
    """Every rank adds all of the shared expert's result again."""
    real = functional.reduce_scatter

    def twice(emit: Any, group: Any, x: Any, rows: Any, features: int) -> Any:
        return emit(torch.mul, real(emit, group, x, rows, features), 2)

    functional.reduce_scatter = twice
    try:
        config = sizes(sharedexpert=2)
        return compare_with_unsharded("deepseek_v2", config, steps=0)
    finally:
        functional.reduce_scatter = real


def test_a_shared_expert_that_is_added_twice_is_noticed(ranks: Pools) -> None:
    assert max(result["max"] for result in ranks(2).run(_added_once_more)) > 1e-3

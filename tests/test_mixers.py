"""Layers that mix tokens without softmax attention: their projections are qkv and o_proj too."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
import zoo
from decoding import decode, prompts, relative_errors, sizes
from marks import typical
from ranks import Pools
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import fgtp_pass
from fgtp_pass import fgtp_backend

_BASE: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 160,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
    "intermediate_size": 144,
}
_MAMBA: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 160}
# model type -> what its tiny config changes, and the out projections of its mixers
MIXERS: dict[str, tuple[dict[str, Any], str]] = {
    "qwen3_next": (
        _BASE
        | {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
        | {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16}
        | {"shared_expert_intermediate_size": 48, "linear_value_head_dim": 16}
        | {"layer_types": ["linear_attention", "full_attention"]},
        "linear_attn.out_proj",
    ),
    "falcon_h1": (
        _BASE
        | {"head_dim": 16, "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16}
        | {"mamba_d_state": 8, "mamba_n_groups": 1},
        "mamba.out_proj",
    ),
    "lfm2": (_BASE | {"layer_types": ["conv", "full_attention"]}, "conv.out_proj"),
    "mamba": (_MAMBA | {"state_size": 8}, "mixer.out_proj"),
    "mamba2": (
        _MAMBA | {"state_size": 8, "num_heads": 8, "head_dim": 16, "n_groups": 2},
        "mixer.out_proj",
    ),
    "minimax": (
        _BASE
        | {"head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1, "block_size": 16}
        | {"layer_types": ["linear_attention", "full_attention"]},
        "self_attn.out_proj",
    ),
    "recurrent_gemma": (
        _BASE
        | {"num_hidden_layers": 3, "head_dim": 16, "lru_width": 64, "attention_window_size": 16}
        | {"block_types": ["recurrent", "recurrent", "attention"]},
        "temporal_block.linear_out",
    ),
    "xlstm": (_MAMBA | {"num_heads": 4}, "mlstm_layer.out_proj"),
}
SIX = (*zoo.COMPONENTS, *zoo.OPT_IN)
WITH_DYNAMIC_CACHE = ("qwen3_next", "falcon_h1", "lfm2")


@torch.no_grad()
def _compare(name: str) -> tuple[float, str]:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[name](**MIXERS[name][0])
    model: Any = AutoModelForCausalLM.from_config(config).eval()
    ids = prompts(dist.get_rank(), 2, 5, 160)

    def run(model: Any, tokens: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        if name in WITH_DYNAMIC_CACHE:
            return decode(model, ids, 2, tokens=tokens)
        return model(input_ids=ids, use_cache=False).logits, torch.empty(0)

    want, chosen = run(model)
    options = {
        "finegrained_tp_config": sizes(**dict.fromkeys(SIX, 2)),
        "inner_backend": "eager",
        "allow_missing": SIX,
    }
    fast = torch.compile(model, backend=fgtp_backend, options=options)
    got, _ = run(fast, chosen)
    plan = fgtp_pass.applied_plan(fast)
    assert plan is not None
    return relative_errors(got, want)[0], plan.to_json()


@pytest.mark.parametrize("name", typical(tuple(MIXERS), "qwen3_next", "falcon_h1"))
def test_projections_of_mixers(ranks: Pools, name: str) -> None:
    for error, text in ranks(2).run(_compare, name):
        assert error <= 1e-5
        plan = fgtp_pass.Plan.from_json(text)
        cut = {
            component: [w.fqn for s in plan.sites if s.component == component for w in s.weights]
            for component in ("oproj", "qkv")
        }
        assert any(MIXERS[name][1] in fqn for fqn in cut["oproj"])
        assert any(f".{i}." in fqn for fqn in cut["qkv"] for i in (0,)), "the first layer's too"

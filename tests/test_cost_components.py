"""What each of the six components weighs in public models, against arithmetic on their shapes."""

from dataclasses import dataclass
from typing import Any

import pytest
from marks import full

from fgtp_pass.models.config_json import read_config
from fgtp_pass.models.meta_model import build
from fgtp_pass.models.trace_layers import plan_model


@dataclass(frozen=True)
class Public:
    """A public model: its config, and by hand the elements of each component's matrices."""

    config: dict[str, Any] | str
    elements: dict[str, int]


def latent(hidden: int, heads: int) -> int:
    """q_a, q_b, kv_a and kv_b of DeepSeek's attention."""
    return hidden * 1536 + 1536 * heads * 192 + hidden * (512 + 64) + 512 * heads * 256


MODELS = {
    "DeepSeek-R1": Public(
        "deepseek-ai/DeepSeek-R1",
        {
            "embedding": 129280 * 7168,
            "lmhead": 129280 * 7168,
            "oproj": 61 * 128 * 128 * 7168,
            "mlp": 3 * 3 * 7168 * 18432,
            "sharedexpert": 58 * 3 * 7168 * 2048,
            "qkv": 61 * latent(7168, 128),
        },
    ),
    "Kimi-K2": Public(
        {
            "model_type": "deepseek_v3",
            "hidden_size": 7168,
            "num_hidden_layers": 61,
            "first_k_dense_replace": 1,
            "num_attention_heads": 64,
            "num_key_value_heads": 64,
            "intermediate_size": 18432,
            "moe_intermediate_size": 2048,
            "n_routed_experts": 384,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
            "vocab_size": 163840,
        },
        {
            "embedding": 163840 * 7168,
            "lmhead": 163840 * 7168,
            "oproj": 61 * 64 * 128 * 7168,
            "mlp": 3 * 7168 * 18432,
            "sharedexpert": 60 * 3 * 7168 * 2048,
            "qkv": 61 * latent(7168, 64),
        },
    ),
    "Qwen3-235B-A22B": Public(
        {
            "model_type": "qwen3_moe",
            "hidden_size": 4096,
            "num_hidden_layers": 94,
            "num_attention_heads": 64,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 1536,
            "vocab_size": 151936,
        },
        {
            "embedding": 151936 * 4096,
            "lmhead": 151936 * 4096,
            "oproj": 94 * 8192 * 4096,
            "qkv": 94 * 4096 * (8192 + 2 * 512),
        },
    ),
    "GLM-4.5": Public(
        {
            "model_type": "glm4_moe",
            "hidden_size": 5120,
            "num_hidden_layers": 92,
            "first_k_dense_replace": 3,
            "num_attention_heads": 96,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "attention_bias": True,
            "intermediate_size": 12288,
            "moe_intermediate_size": 1536,
            "n_routed_experts": 160,
            "n_shared_experts": 1,
            "vocab_size": 151552,
        },
        {
            "embedding": 151552 * 5120,
            "lmhead": 151552 * 5120,
            "oproj": 92 * 12288 * 5120,
            "mlp": 3 * 3 * 5120 * 12288,
            "sharedexpert": 89 * 3 * 5120 * 1536,
            "qkv": 92 * 5120 * (12288 + 2 * 1024),
        },
    ),
    "Qwen2-57B-A14B": Public(
        {
            "model_type": "qwen2_moe",
            "hidden_size": 3584,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 2560,
            "shared_expert_intermediate_size": 20480,
            "vocab_size": 151936,
        },
        {
            "embedding": 151936 * 3584,
            "lmhead": 151936 * 3584,
            "oproj": 28 * 3584 * 3584,
            "sharedexpert": 28 * 3 * 3584 * 20480,
            "qkv": 28 * 3584 * (3584 + 2 * 512),
        },
    ),
    "Llama-4-Maverick": Public(
        {
            "model_type": "llama4_text",
            "hidden_size": 5120,
            "num_hidden_layers": 48,
            "num_attention_heads": 40,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "intermediate_size": 8192,
            "intermediate_size_mlp": 16384,
            "num_local_experts": 128,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
            "vocab_size": 202048,
        },
        {
            "embedding": 202048 * 5120,
            "lmhead": 202048 * 5120,
            "oproj": 48 * 5120 * 5120,
            "mlp": 24 * 3 * 5120 * 16384,
            "sharedexpert": 24 * 3 * 5120 * 8192,
            "qkv": 48 * 5120 * (5120 + 2 * 1024),
        },
    ),
}
IN_SHORT = ("DeepSeek-R1", "Qwen2-57B-A14B")


@pytest.mark.parametrize(
    "name", [name if name in IN_SHORT else pytest.param(name, marks=full) for name in MODELS]
)
def test_elements_of_components(name: str) -> None:
    public = MODELS[name]
    config = read_config(public.config) if isinstance(public.config, str) else public.config
    plan, _ = plan_model(build(config))
    found: dict[str, int] = {}
    for site in plan.sites:
        cut = [weight.shape for weight in site.weights if len(weight.shape) == 2]
        found[site.component] = found.get(site.component, 0) + sum(a * b for a, b in cut)
    assert found == public.elements

"""Tiny random-weight Hugging Face decoders, and which component each of their parameters is.

The sorting below goes by parameter NAMES, on purpose: it is the independent answer that the
pass, which looks only at data flow, is checked against.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from typing import Any, cast

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

COMPONENTS = ("embedding", "lmhead", "oproj", "mlp")
OPT_IN = ("sharedexpert", "qkv")

# First match wins; a parameter that matches nothing is an error.
_RULES: tuple[tuple[str, str], ...] = (
    ("*norm*", "norm"),
    ("*.ln_?.*", "norm"),
    ("*.embed_tokens.weight", "embedding"),
    ("*.wte.weight", "embedding"),
    ("*.embed_in.weight", "embedding"),
    ("*.word_embeddings.weight", "embedding"),
    ("*.wpe.weight", "position_embedding"),
    ("*.embed_positions.weight", "position_embedding"),
    ("lm_head.*", "lmhead"),
    ("*.[qkv]_proj.*", "qkv"),
    ("*.qkv_proj.*", "qkv"),
    ("*.c_attn.*", "qkv"),
    ("*.query_key_value.*", "qkv"),
    ("*.q_[ab]_proj.*", "qkv"),
    ("*.kv_a_proj_with_mqa.*", "qkv"),
    ("*.kv_b_proj.*", "qkv"),
    ("*.fused_qkv_a_proj.*", "qkv"),  # vLLM's name
    ("*.self_attn.sinks", "other"),
    ("*.self_attn.o_proj.*", "oproj"),
    ("*attn.out_proj.*", "oproj"),  # opt, gptj
    ("*.self_attn.dense.*", "oproj"),  # phi
    ("*attention.dense.*", "oproj"),  # falcon, gpt_neox, bloom
    ("*.attn.c_proj.*", "oproj"),  # gpt2
    ("*.shared_expert_gate.*", "shared_expert_gate"),
    ("*.shared_expert.*", "sharedexpert"),
    ("*.shared_experts.*", "sharedexpert"),
    ("*.experts.*", "expert"),
    ("*.mlp.gate.weight", "router"),
    ("*.block_sparse_moe.gate.weight", "router"),  # vLLM's name
    ("*.router.*", "router"),
    ("*.fc[12].*", "mlp"),  # opt, phi
    ("*.mlp.fc_in.*", "mlp"),  # gptj
    ("*.mlp.fc_out.*", "mlp"),
    ("*.mlp.c_fc.*", "mlp"),  # gpt2, starcoder2
    ("*.mlp.c_proj.*", "mlp"),
    ("*.mlp.dense_h_to_4h.*", "mlp"),  # falcon, gpt_neox, bloom
    ("*.mlp.dense_4h_to_h.*", "mlp"),
    ("*.mlp.gate_up_proj.*", "mlp"),  # phi3, glm4
    ("*.mlp.gate_proj.*", "mlp"),
    ("*.mlp.up_proj.*", "mlp"),
    ("*.mlp.down_proj.*", "mlp"),
    ("*.feed_forward.gate_proj.*", "mlp"),  # llama4
    ("*.feed_forward.up_proj.*", "mlp"),
    ("*.feed_forward.gate_up_proj.*", "mlp"),  # vLLM's name
    ("*.feed_forward.down_proj.*", "mlp"),
)


@dataclass(frozen=True)
class Architecture:
    """One entry of the zoo: a transformers model type and what its tiny config changes."""

    name: str
    model_type: str
    overrides: dict[str, Any] = field(default_factory=dict)
    embedding_scale: float = 1.0  # below 1 where a tied model would only repeat its last token

    @property
    def config_class(self) -> Any:
        return CONFIG_MAPPING[self.model_type]

    @property
    def model_class(self) -> type[PreTrainedModel]:
        return cast("type[PreTrainedModel]", MODEL_FOR_CAUSAL_LM_MAPPING[self.config_class])

    @property
    def supports_sdpa(self) -> bool:
        return bool(self.model_class._supports_sdpa)

    @property
    def tied(self) -> bool:
        """Whether the embedding and the head are one parameter."""
        return bool(set(self.expected["embedding"]) & set(self.expected["lmhead"]))

    @property
    def expected(self) -> dict[str, tuple[str, ...]]:
        """Component -> the parameters the pass has to shard, in ``named_parameters`` order."""
        return dict(_expected(self.name))


def config(name: str, **overrides: Any) -> Any:
    """The tiny configuration of one architecture."""
    arch = ARCHITECTURES[name]
    return arch.config_class(**copy.deepcopy(_COMMON | arch.overrides | overrides))


def build(
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    device: torch.device | str | None = None,
    attn_implementation: str = "sdpa",
    **overrides: Any,
) -> PreTrainedModel:
    """A tiny model in eval mode; the same seed gives the same weights on every device.

    ``overrides`` go to the config. An architecture without SDPA gets eager attention instead.
    The global random state is left as it was.
    """
    if device is not None and torch.device(device).type == "meta":
        # transformers' default, grouped_mm, only takes bfloat16 on the meta device (torch 2.13)
        overrides = {"experts_implementation": "batched_mm"} | overrides
    if attn_implementation == "sdpa" and not ARCHITECTURES[name].supports_sdpa:
        attn_implementation = "eager"
    target = torch.device("cpu" if device is None else device)
    with (
        torch.random.fork_rng(devices=[]),
        torch.device("meta" if target.type == "meta" else "cpu"),
    ):
        torch.manual_seed(seed)  # what transformers itself draws is overwritten below
        model = cast(Any, AutoModelForCausalLM).from_config(
            config(name, **overrides), dtype=dtype, attn_implementation=attn_implementation
        )
    if target.type != "meta":
        _randomize(model, seed, ARCHITECTURES[name].embedding_scale)
    return cast(PreTrainedModel, model.to(target).eval())


@torch.no_grad()
def _randomize(model: PreTrainedModel, seed: int, embedding_scale: float) -> None:
    """Weights large enough that tokens differ clearly, no bias at zero, no norm at one."""
    generator = torch.Generator().manual_seed(seed)
    std = 1.6 / float(model.config.hidden_size) ** 0.5

    def noise(like: torch.Tensor, scale: float) -> torch.Tensor:
        return scale * torch.randn(like.shape, generator=generator, dtype=torch.float32)

    for name, parameter in model.named_parameters():
        category = categorize(name)
        if category == "norm":  # around its neutral value, which is 0 for gemma's weights
            parameter.copy_(parameter.float() + noise(parameter, 0.2))
        elif parameter.dim() == 1 or name.endswith("_bias"):
            parameter.copy_(noise(parameter, 0.15))
        else:
            scale = embedding_scale if category == "embedding" else 1.0
            parameter.copy_(noise(parameter, scale * std))
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(noise(buffer, 0.1))


def categorize(fqn: str) -> str:
    """The category of a parameter, by its name: a component, or what is left alone."""
    for pattern, category in _RULES:
        if fnmatchcase(fqn, pattern):
            return category
    raise KeyError(f"no rule for parameter {fqn!r}")


def components(model: PreTrainedModel) -> dict[str, tuple[str, ...]]:
    """Component -> parameters of a model; a tied weight counts as embedding and as head."""
    parameters = dict(model.named_parameters())  # a tied weight once, under its first name
    every = (*COMPONENTS, *OPT_IN)
    found = {key: [n for n in parameters if categorize(n) == key] for key in every}
    head = cast(Any, model).get_output_embeddings().weight
    tied = [name for name in found["embedding"] if parameters[name] is head]
    found["lmhead"] = tied + found["lmhead"]
    return {key: tuple(names) for key, names in found.items()}


@cache
def _expected(name: str) -> dict[str, tuple[str, ...]]:
    return components(build(name, device="meta"))


def expected_left_alone(name: str, on: tuple[str, ...] = COMPONENTS) -> dict[str, str]:
    """Every parameter that the pass must not touch with these components on -> its category."""
    names = [fqn for fqn, _ in build(name, device="meta").named_parameters()]
    categories = {fqn: categorize(fqn) for fqn in names}
    return {fqn: category for fqn, category in categories.items() if category not in on}


# No EOS: a random model would otherwise stop generating at a random place.
_COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 160,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
}
_FFN: dict[str, Any] = {"intermediate_size": 144}
_GQA: dict[str, Any] = _FFN | {"num_key_value_heads": 2}
_GQA16: dict[str, Any] = _GQA | {"head_dim": 16}
_MHA: dict[str, Any] = _FFN | {"num_key_value_heads": 4}
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 48}
_MLA: dict[str, Any] = {  # v_head_dim is neither qk_nope_head_dim nor hidden_size / heads
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}
_DEEPSEEK: dict[str, Any] = (
    _FFN
    | _EXPERTS
    | _MLA
    | {
        "first_k_dense_replace": 1,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
    }
)
_GROUPED: dict[str, Any] = {"n_group": 2, "topk_group": 1}
_GEMMA: dict[str, Any] = _GQA16 | {
    "query_pre_attn_scalar": 16,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"],
}
_YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 32,
}

ARCHITECTURES: dict[str, Architecture] = {
    arch.name: arch
    for arch in (
        Architecture("llama", "llama", _GQA16),
        Architecture("mistral", "mistral", _GQA16 | {"sliding_window": None}),
        Architecture("qwen2", "qwen2", _GQA),
        Architecture("qwen3", "qwen3", _GQA16),
        Architecture("gemma2", "gemma2", _GEMMA, embedding_scale=0.2),
        Architecture("gemma3", "gemma3_text", _GEMMA, embedding_scale=0.2),
        # 257: a vocabulary no group size divides.
        Architecture("gpt2", "gpt2", {"n_inner": 144, "vocab_size": 257}),
        Architecture("opt", "opt", {"ffn_dim": 144, "word_embed_proj_dim": 64}),
        Architecture("phi", "phi", _GQA),
        Architecture("phi3", "phi3", _GQA | {"pad_token_id": 3}),
        Architecture("falcon", "falcon", {"ffn_hidden_size": 144}),  # multi-query
        Architecture("gpt_neox", "gpt_neox", _FFN),
        Architecture("gptj", "gptj", {"n_inner": 144, "rotary_dim": 8}),
        Architecture("bloom", "bloom"),  # its FFN is always 4 * hidden
        Architecture("cohere", "cohere", _GQA | {"logit_scale": 0.5}),
        Architecture(
            "granite",
            "granite",
            _GQA
            | {"attention_bias": True, "mlp_bias": True}
            | {"embedding_multiplier": 4.0, "logits_scaling": 2.0}
            | {"residual_multiplier": 0.5, "attention_multiplier": 0.25},
        ),
        Architecture("olmo2", "olmo2", _GQA),
        Architecture("glm4", "glm4", _GQA16 | {"pad_token_id": 3}),
        Architecture("starcoder2", "starcoder2", _GQA | {"use_bias": True}),
        Architecture("stablelm", "stablelm", _GQA | {"use_qkv_bias": True}),
        Architecture("nemotron", "nemotron", _GQA16),
        Architecture("mixtral", "mixtral", _GQA16 | {"num_local_experts": 4}),
        Architecture(
            "qwen2_moe",
            "qwen2_moe",
            _MHA
            | _EXPERTS
            # three, so that one layer with experts follows another
            | {"num_hidden_layers": 3, "num_experts": 4, "mlp_only_layers": [0]}
            | {"shared_expert_intermediate_size": 80},
        ),
        Architecture(
            "qwen3_moe",
            "qwen3_moe",
            _GQA16 | _EXPERTS | {"num_local_experts": 4, "mlp_only_layers": [0]},
        ),
        Architecture(
            "deepseek_v2",
            "deepseek_v2",
            _DEEPSEEK | _GROUPED | {"topk_method": "group_limited_greedy"},
        ),
        Architecture("deepseek_v3", "deepseek_v3", _DEEPSEEK | _GROUPED),
        Architecture(
            "glm4_moe",
            "glm4_moe",
            _GQA16
            | _EXPERTS
            | _GROUPED
            | {"n_routed_experts": 4, "n_shared_experts": 1}
            | {"first_k_dense_replace": 1, "use_qk_norm": True, "attention_bias": True},
        ),
        Architecture(
            "gpt_oss",
            "gpt_oss",
            _GQA16
            | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16}
            | {"rope_parameters": _YARN},
        ),
        Architecture(
            "llama4",
            "llama4_text",
            _GQA16
            | {"intermediate_size": 48, "intermediate_size_mlp": 144}  # experts, dense FFN
            | {"num_local_experts": 4, "num_experts_per_tok": 2}
            | {"interleave_moe_layer_step": 2, "no_rope_layer_interval": 2}
            | {"attention_chunk_size": 16},
        ),
    )
}

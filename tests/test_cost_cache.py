"""What layers keep of a sequence, from the model itself, against arithmetic on public shapes."""

from dataclasses import dataclass
from typing import Any

import pytest
from marks import full

from fgtp_pass.cost.model_summary import AttentionKind
from fgtp_pass.models.attention_cache import attention_kinds
from fgtp_pass.models.config_json import read_config
from fgtp_pass.models.layer_stack import find_layers
from fgtp_pass.models.meta_model import build


@dataclass(frozen=True)
class Shape:
    """A public model: what its config says, and by hand what its layers keep in 16 bits.

    config: of its config.json, what decides the cache, or the name of a shipped one. every: layers
    that keep all tokens, and elements per token. window: layers, elements per token, tokens kept.
    state: bytes per sequence, however long.
    """

    config: dict[str, Any] | str
    every: tuple[int, int] = (0, 0)
    window: tuple[int, int, int] = (0, 0, 0)
    state: int = 0

    def cache_bytes(self, context: int) -> int:
        layers, elements, tokens = self.window
        kept = self.every[0] * self.every[1] * context + layers * elements * min(tokens, context)
        return 2 * kept + self.state


def decoder(
    model_type: str, hidden: int, layers: int, heads: int, kv_heads: int | None = None, **more: Any
) -> dict[str, Any]:
    kv = {} if kv_heads is None else {"num_key_value_heads": kv_heads}
    return {
        "model_type": model_type,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 1024,  # nothing is kept of it
        "vocab_size": 1000,
        "pad_token_id": 0,
        **kv,
        **more,
    }


def deepseek(model_type: str, layers: int, **more: Any) -> dict[str, Any]:
    latent = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128}
    few = {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    return decoder(
        model_type, 2048, layers, 16, 16, v_head_dim=128, moe_intermediate_size=64, **latent,
        **few, **more,
    )  # fmt: skip


MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
GEMMA = {"head_dim": 256, "sliding_window": 4096}
SHAPES: dict[str, Shape] = {
    "Llama-2-7B": Shape(decoder("llama", 4096, 32, 32), (32, 8192)),
    "Llama-3.1-8B": Shape("meta-llama/Llama-3.1-8B", (32, 2048)),
    "Llama-3.1-70B": Shape("meta-llama/Llama-3.1-70B", (80, 2048)),
    "Llama-3.1-405B": Shape("meta-llama/Llama-3.1-405B", (126, 2048)),  # published: 516,096 bytes
    "Qwen2.5-72B": Shape(decoder("qwen2", 8192, 80, 64, 8), (80, 2048)),  # published: 327,680
    "Qwen3-32B": Shape("Qwen/Qwen3-32B", (64, 2048)),
    "Qwen3-235B-A22B": Shape(
        decoder("qwen3_moe", 4096, 94, 64, 4, head_dim=128, **MOE), (94, 1024)
    ),
    "Qwen1.5-MoE-A2.7B": Shape(decoder("qwen2_moe", 2048, 24, 16, 16, **MOE), (24, 4096)),
    # one KV head for all, or eight that the config calls otherwise
    "Falcon-7B": Shape(decoder("falcon", 4544, 32, 71, multi_query=True), (32, 128)),
    "Falcon-40B": Shape(
        decoder("falcon", 8192, 60, 128, num_kv_heads=8, new_decoder_architecture=True), (60, 1024)
    ),
    "Falcon-180B": Shape(
        decoder("falcon", 14848, 80, 232, num_kv_heads=8, new_decoder_architecture=True), (80, 1024)
    ),
    "StarCoder-15B": Shape(
        {"model_type": "gpt_bigcode", "n_embd": 6144, "n_layer": 40, "n_head": 48}, (40, 256)
    ),
    "GPT-2-XL": Shape(
        {"model_type": "gpt2", "n_embd": 1600, "n_layer": 48, "n_head": 25}, (48, 3200)
    ),
    "OPT-66B": Shape(
        decoder("opt", 9216, 64, 72, ffn_dim=1024, word_embed_proj_dim=9216), (64, 18432)
    ),
    "BLOOM-176B": Shape(
        {"model_type": "bloom", "hidden_size": 14336, "n_layer": 70, "n_head": 112}, (70, 28672)
    ),
    "GPT-NeoX-20B": Shape(decoder("gpt_neox", 6144, 44, 64), (44, 12288)),
    # windows in all layers, in some, in chunks
    "Mistral-7B-v0.1": Shape(
        decoder("mistral", 4096, 32, 32, 8, sliding_window=4096), window=(32, 2048, 4096)
    ),
    "Mistral-7B-v0.3": Shape(decoder("mistral", 4096, 32, 32, 8, sliding_window=None), (32, 2048)),
    "StarCoder2-15B": Shape(
        decoder("starcoder2", 6144, 40, 48, 4, sliding_window=4096), window=(40, 1024, 4096)
    ),
    "Gemma-7B": Shape(decoder("gemma", 3072, 28, 16, 16, head_dim=256), (28, 8192)),
    "Gemma-2-9B": Shape(
        decoder("gemma2", 3584, 42, 16, 8, **GEMMA), (21, 4096), (21, 4096, 4096)
    ),
    "Gemma-2-27B": Shape(
        decoder("gemma2", 4608, 46, 32, 16, **GEMMA | {"head_dim": 128}),
        (23, 4096),
        (23, 4096, 4096),
    ),
    "Gemma-3-4B": Shape(
        decoder("gemma3_text", 2560, 34, 8, 4, head_dim=256, sliding_window=1024),
        (5, 2048),
        (29, 2048, 1024),
    ),
    "Gemma-3-27B": Shape(
        decoder("gemma3_text", 5376, 62, 32, 16, head_dim=128, sliding_window=1024),
        (10, 4096),
        (52, 4096, 1024),
    ),
    "gpt-oss-20b": Shape(
        decoder("gpt_oss", 2880, 24, 64, 8, head_dim=64, sliding_window=128, num_local_experts=8),
        (12, 1024),
        (12, 1024, 128),
    ),
    "gpt-oss-120b": Shape(
        decoder("gpt_oss", 2880, 36, 64, 8, head_dim=64, sliding_window=128, num_local_experts=8),
        (18, 1024),
        (18, 1024, 128),
    ),
    "Llama-4-Scout": Shape(
        decoder(
            "llama4_text", 5120, 48, 40, 8, head_dim=128, num_local_experts=2,
            attention_chunk_size=8192,
        ),
        (12, 2048),
        (36, 2048, 8192),
    ),
    "Llama-4-Maverick": Shape(
        decoder(
            "llama4_text", 5120, 48, 40, 8, head_dim=128, num_local_experts=2,
            interleave_moe_layer_step=2, attention_chunk_size=8192,
        ),
        (12, 2048),
        (36, 2048, 8192),
    ),
    "Command-R-plus": Shape(decoder("cohere", 12288, 64, 96, 8), (64, 2048)),
    "Command-A": Shape(
        decoder("cohere2", 12288, 64, 96, 8, sliding_window=4096), (16, 2048), (48, 2048, 4096)
    ),
    "EXAONE-4.0-32B": Shape(
        decoder(
            "exaone4", 5120, 64, 40, 8, head_dim=128, sliding_window=4096,
            sliding_window_pattern=4,
        ),
        (16, 2048),
        (48, 2048, 4096),
    ),
    # one latent for all heads, twice in a layer, with an indexer beside it
    "DeepSeek-V2-Lite": Shape(deepseek("deepseek_v2", 27, q_lora_rank=None), (27, 576)),
    "DeepSeek-V2": Shape(deepseek("deepseek_v2", 60, q_lora_rank=1536), (60, 576)),
    "DeepSeek-R1": Shape("deepseek-ai/DeepSeek-R1", (61, 576)),  # published: 70,272 bytes
    "Kimi-K2": Shape(deepseek("deepseek_v3", 61, q_lora_rank=1536), (61, 576)),
    "DeepSeek-V3.2": Shape(
        deepseek("deepseek_v32", 61, q_lora_rank=1536, index_head_dim=128, index_topk=2048),
        (61, 576 + 128),
    ),
    "GLM-4.5": Shape(
        decoder("glm4_moe", 5120, 92, 96, 8, head_dim=128, n_routed_experts=8), (92, 2048)
    ),
    "GLM-4-9B": Shape(decoder("glm4", 4096, 40, 32, 2, head_dim=128), (40, 512)),
    "Mixtral-8x7B": Shape(decoder("mixtral", 4096, 32, 32, 8, num_local_experts=2), (32, 2048)),
    "MiniMax-M2": Shape(
        decoder(
            "minimax_m2", 3072, 62, 48, 8, head_dim=128, num_local_experts=4, num_experts_per_tok=2
        ),
        (62, 2048),
    ),
    "OLMo-2-13B": Shape(decoder("olmo2", 5120, 40, 40), (40, 10240)),
    "Granite-3.1-8B": Shape(decoder("granite", 4096, 40, 32, 8), (40, 2048)),
    "Phi-4": Shape(decoder("phi3", 5120, 40, 40, 10), (40, 2560)),
    "Nemotron-4-340B": Shape(decoder("nemotron", 18432, 96, 96, 8), (96, 3072)),
    # few layers with attention, the rest with a convolution and a recurrent state
    "Jamba-v0.1": Shape(
        decoder(
            "jamba", 4096, 32, 32, 8, num_experts=2, mamba_d_state=16, mamba_d_conv=4,
            mamba_expand=2,
        ),
        (4, 2048),
        state=28 * 8192 * (4 * 2 + 16 * 4),
    ),
    "Qwen3-Next-80B-A3B": Shape(
        decoder("qwen3_next", 2048, 48, 16, 2, head_dim=256, **MOE),
        (12, 1024),
        state=36 * ((2 * 16 * 128 + 32 * 128) * 4 * 2 + 32 * 128 * 128 * 4),
    ),
    "Falcon-H1-34B": Shape(
        decoder(
            "falcon_h1", 5120, 72, 20, 4, head_dim=128, mamba_d_ssm=4096, mamba_n_heads=32,
            mamba_d_head=128, mamba_d_state=256, mamba_n_groups=2,
        ),
        (72, 1024),
        state=72 * ((4096 + 2 * 2 * 256) * 4 * 2 + 32 * 128 * 256 * 4),
    ),
    "Mamba-Codestral-7B": Shape(
        {
            "model_type": "mamba2", "hidden_size": 4096, "num_hidden_layers": 64, "num_heads": 128,
            "head_dim": 64, "state_size": 128, "n_groups": 8, "vocab_size": 1000,
        },
        state=64 * ((8192 + 2 * 8 * 128) * 4 * 2 + 128 * 64 * 128 * 4),
    ),
}  # fmt: skip

TYPICAL = ("Falcon-7B", "Gemma-3-27B", "gpt-oss-20b", "DeepSeek-V3.2", "Jamba-v0.1")


def kinds_of(config: dict[str, Any] | str) -> tuple[tuple[AttentionKind, ...], str | None]:
    read = read_config(config) if isinstance(config, str) else {"dtype": "bfloat16", **config}
    model = build(read)
    return attention_kinds(model, find_layers(model))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in TYPICAL else full) for name in SHAPES]
)
def test_the_cache_is_that_of_the_public_shape(name: str) -> None:
    shape = SHAPES[name]
    kinds, assumed = kinds_of(shape.config)
    assert assumed is None
    for context in (100, 8192, 100_000):
        found = sum(kind.cache_bytes(context, 2) for kind in kinds)
        assert found == shape.cache_bytes(context), context


def test_forty_shapes() -> None:
    assert len(SHAPES) >= 40


def test_a_step_of_sparse_attention_reads_less_than_is_kept() -> None:
    kinds, _ = kinds_of(SHAPES["DeepSeek-V3.2"].config)
    latent, indexer = kinds
    assert (latent.width, latent.reads, latent.window) == (576, 2048, None)
    assert (indexer.width, indexer.reads) == (128, None)


def test_mla_multiplies_in_its_latent_when_it_decodes() -> None:
    (kind,), _ = kinds_of(SHAPES["DeepSeek-V2"].config)
    assert kind.decode_flops == 2 * 16 * (576 + 512)
    assert kind.prefill_flops == 2 * 16 * (128 + 64 + 128)


def test_two_attentions_in_a_layer_keep_two_caches() -> None:
    config = {
        "model_type": "longcat_flash", "dtype": "bfloat16", "hidden_size": 256, "num_layers": 3,
        "num_hidden_layers": 6, "num_attention_heads": 4, "ffn_hidden_size": 64,
        "expert_ffn_hidden_size": 64, "n_routed_experts": 4, "zero_expert_num": 2, "moe_topk": 2,
        "q_lora_rank": 64, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16,
        "v_head_dim": 16, "head_dim": 16, "vocab_size": 1000,
    }  # fmt: skip
    (kind,), assumed = kinds_of(config)
    assert assumed is None
    assert (kind.layers, kind.width) == (6, 48)


def test_what_cannot_be_run_is_assumed_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaForCausalLM

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("no meta here")

    monkeypatch.setattr(LlamaForCausalLM, "forward", broken)
    (kind,), assumed = kinds_of(SHAPES["Llama-2-7B"].config)
    assert kind.cache_bytes(1, 2) == 2 * 32 * 8192
    assert assumed == "RuntimeError: no meta here"


def test_heads_are_cut_as_far_as_there_are_any() -> None:
    grouped = AttentionKind(layers=2, heads=8, width=2048)
    latent = AttentionKind(layers=2, heads=1, width=576)
    state = AttentionKind(layers=2, state_bytes=800)
    assert grouped.cache_bytes(10, 2, 4) == grouped.cache_bytes(10, 2) / 4
    assert grouped.cache_bytes(10, 2, 16) == grouped.cache_bytes(10, 2) / 8  # engines hold copies
    assert latent.cache_bytes(10, 2, 8) == latent.cache_bytes(10, 2)
    assert state.cache_bytes(10, 2, 8) == 200

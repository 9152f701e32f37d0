"""How checkpoints declare that they are quantised, and what that means for each weight."""

import json
from typing import Any

import pytest
import zoo

from fgtp_pass import ConfigError
from fgtp_pass.cost.hardware import load
from fgtp_pass.cost.layout import Deployment, Layout, Load
from fgtp_pass.cost.quantization import (
    Scheme,
    cache_element_bytes,
    matches,
    precision,
    scheme_of,
)
from fgtp_pass.models.declared import declared_cache_dtype, declared_scheme
from fgtp_pass.models.summarize import summarize

GROUP = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}
EIGHT = {"num_bits": 8, "type": "float", "strategy": "channel"}
NVFP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}


def compressed(weights: Any, inputs: Any, **more: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, **more}


# what public checkpoints declare -> scheme, bits of an FFN's element, what it is multiplied in
DECLARED = [
    ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8", 8, "float8"),
    ({"quant_method": "fbgemm_fp8"}, "fp8", 8, "float8"),
    ({"quant_method": "awq", "bits": 4, "group_size": 128}, "w4a16", 4.125, "bfloat16"),
    ({"quant_method": "gptq", "bits": 8, "group_size": -1}, "w8a16", 8, "bfloat16"),
    (compressed(EIGHT, {**EIGHT, "dynamic": True}), "fp8", 8, "float8"),
    (compressed({**EIGHT, "type": "int"}, {**EIGHT, "type": "int"}), "w8a8", 8, "int8"),
    (compressed(GROUP, None), "w4a16", 4.125, "bfloat16"),
    (compressed(NVFP4, NVFP4), "nvfp4", 4.5, "float4"),
    ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "nvfp4", 4.5, "float4"),
    ({"quant_method": "modelopt", "quant_algo": "FP8"}, "fp8", 8, "float8"),
    ({"quant_method": "mxfp4"}, "mxfp4", 4.25, "float4"),
    ({"quant_method": "quark", "global_quant_config": {"weight": {"dtype": "fp8_e4m3"}}}, "fp8", 8,
     "float8"),
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "w4a16", 4.125, "bfloat16"),
    ({"quant_method": "auto-round", "bits": 4, "group_size": 64}, "w4a16", 4.25, "bfloat16"),
]  # fmt: skip


@pytest.mark.parametrize(("declared", "name", "bits", "matmul_dtype"), DECLARED)
def test_schemes_of_public_checkpoints(
    declared: dict[str, Any], name: str, bits: float, matmul_dtype: str
) -> None:
    scheme = declared_scheme({"quantization_config": declared})
    assert scheme is not None
    assert scheme.name == name
    kept = precision("bfloat16", scheme, "model.layers.3.mlp.down_proj")
    assert (8 * kept.element_bytes, kept.matmul_dtype) == (bits, matmul_dtype)


def test_a_checkpoint_that_is_not_quantised() -> None:
    assert declared_scheme({}) is None
    assert declared_scheme({"quantization_config": None}) is None


def test_an_unheard_of_method_keeps_its_name() -> None:
    scheme = declared_scheme({"quantization_config": {"quant_method": "unheard-of"}})
    assert scheme == Scheme(name="unheard-of", rules=())
    with pytest.raises(ConfigError, match=r"unknown scheme 'w8'.*'w8a8'"):
        scheme_of("w8")


def test_modules_that_a_checkpoint_leaves_whole() -> None:
    """As gpt-oss and compressed-tensors name them."""
    left = ["model.layers.*.self_attn", "re:.*mlp.gate$", "lm_head"]
    scheme = declared_scheme(
        {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": left}}
    )
    for module, bits in (
        ("model.layers.7.self_attn.o_proj", 16),
        ("model.layers.7.mlp.gate", 16),
        ("lm_head", 16),
        ("model.layers.7.mlp.experts", 4.25),
        ("model.layers.7.mlp.gate_proj", 4.25),
    ):
        assert 8 * precision("bfloat16", scheme, module).element_bytes == bits, module
    assert matches("anything", ())
    assert not matches("model.lm_head_norm", ("lm_head",))


def test_groups_of_modules_with_schemes_of_their_own() -> None:
    groups = {
        "attention": {
            "targets": ["re:.*self_attn.*"],
            "weights": EIGHT,
            "input_activations": EIGHT,
        },
        "experts": {"targets": ["re:.*experts.*"], "weights": NVFP4, "input_activations": NVFP4},
    }
    config = {"quant_method": "compressed-tensors", "config_groups": groups}
    scheme = declared_scheme({"quantization_config": config})
    bits = [
        8 * precision("bfloat16", scheme, f"model.layers.0.{module}").element_bytes
        for module in ("self_attn.o_proj", "mlp.experts", "mlp.shared_experts_gate", "norm")
    ]
    assert bits == [8, 4.5, 4.5, 16]


@pytest.mark.parametrize(
    ("declared", "dtype"),
    [
        ({"quant_method": "modelopt", "kv_cache_quant_algo": "FP8"}, "fp8"),
        (compressed(EIGHT, EIGHT, kv_cache_scheme=EIGHT), "fp8"),
        ({"quant_method": "fp8"}, None),
    ],
)
def test_the_caches_dtype_of_a_checkpoint(declared: dict[str, Any], dtype: str | None) -> None:
    assert declared_cache_dtype({"quantization_config": declared}) == dtype


def test_dtypes_of_the_cache() -> None:
    assert [cache_element_bytes("bfloat16", d) for d in (None, "auto", "fp8_e4m3", "fp8")] == [
        *(2, 2, 1, 1)
    ]
    with pytest.raises(ConfigError, match=r"unknown dtype 'float-16'.*'float16'"):
        cache_element_bytes("bfloat16", "float-16")


def test_a_scheme_with_exceptions_counts_each_weight(tmp_path: Any) -> None:
    """Experts in 4 bits, attention in 16: bytes of a rank, against torch's own count."""
    left = ["self_attn", "mlp.gate", "lm_head", "embed_tokens"]
    config = zoo.config("qwen2_moe").to_dict() | {
        "dtype": "bfloat16",
        "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": left},
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    summary = summarize(str(path))
    case = Deployment(summary, load("h200"), Load(1, 8, scheme=summary.scheme), 8)
    want = 0.0
    for name, parameter in zoo.build("qwen2_moe", device="meta").named_parameters():
        whole = parameter.dim() < 2 or any(f".{part}." in f".{name}" for part in left)
        want += parameter.numel() * (2 if whole else 4.25 / 8)
    assert case.weight_bytes(Layout()) == pytest.approx(want)

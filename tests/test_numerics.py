"""Every architecture against its unsharded self, in real processes with real collectives."""

from typing import Any

import pytest
from decoding import compare_with_unsharded, sizes
from marks import TYPICAL, architectures, typical
from ranks import Pools
from test_detection import missing

FP32_MAX, BF16_RMS = 1e-5, 0.02
# In half precision any rounding can tip a router between two experts that score alike, and then
# a token takes another expert: these models get weights (a seed) with no such tie.
BF16_SEED = {"qwen2_moe": 2, "qwen3_moe": 2}
INDUCTOR = ("llama", "gpt2", "deepseek_v3")


def check(results: list[dict[str, Any]], dtype: str = "float32") -> None:
    for result in results:
        if dtype == "float32":
            assert result["max"] <= FP32_MAX
            assert result["same_tokens"]
        else:
            assert result["rms"] <= BF16_RMS
    assert len({result["plan"] for result in results}) == 1


@pytest.mark.parametrize("name", architectures())
def test_two_ranks_fp32(ranks: Pools, name: str) -> None:
    results = ranks(2).run(
        compare_with_unsharded,
        name,
        sizes(2),
        marked=name not in TYPICAL,
        allow_missing=missing(name),
    )
    check(results)


@pytest.mark.parametrize("name", TYPICAL)
def test_two_ranks_bf16(ranks: Pools, name: str) -> None:
    results = ranks(2).run(
        compare_with_unsharded,
        name,
        sizes(2),
        dtype="bfloat16",
        seed=BF16_SEED.get(name, 0),
        lengths=(6,),
        steps=1,
        allow_missing=missing(name),
    )
    check(results, "bfloat16")


@pytest.mark.parametrize("name", typical(INDUCTOR, "llama"))
def test_two_ranks_inductor(ranks: Pools, name: str) -> None:
    check(ranks(2).run(compare_with_unsharded, name, sizes(2), inner="inductor", steps=1))


STATIC = ("llama", "gemma3", "gpt2", "bloom", "deepseek_v2")


@pytest.mark.parametrize("name", typical(STATIC, "gemma3"))
def test_static_cache(ranks: Pools, name: str) -> None:
    check(ranks(2).run(compare_with_unsharded, name, sizes(2), steps=2, static=True))


@pytest.mark.parametrize("name", typical(("llama", "gpt2", "qwen2_moe", "phi3"), "gpt2"))
def test_eager_attention_and_aot(ranks: Pools, name: str) -> None:
    results = ranks(2).run(
        compare_with_unsharded, name, sizes(2), attention="eager", inner="aot_eager", steps=1
    )
    check(results)


FOUR_RANKS = {
    "llama": sizes(2),  # two groups of two
    "starcoder2": sizes(4),
    "gpt2": sizes(4),  # a vocabulary of 257
    "deepseek_v3": sizes(embedding=4, lmhead=2, oproj=4, mlp=2),
    "qwen3": sizes(embedding=2, lmhead=4, oproj=2, mlp=4),
}


@pytest.mark.parametrize("name", typical(FOUR_RANKS, "llama", "gpt2"))
def test_four_ranks(ranks: Pools, name: str) -> None:
    check(ranks(4).run(compare_with_unsharded, name, FOUR_RANKS[name], steps=1))


@pytest.mark.parametrize("component", ["embedding", "lmhead", "oproj", "mlp"])
def test_one_component_alone(ranks: Pools, component: str) -> None:
    config = sizes(**{component: 2})
    for result in (results := ranks(2).run(compare_with_unsharded, "llama", config, steps=1)):
        assert f'"{component}"' in result["plan"]
    check(results)


@pytest.mark.parametrize("width", [145, 97, 3])
def test_inner_widths_that_k_does_not_divide(ranks: Pools, width: int) -> None:
    for name in ("llama", "phi3", "starcoder2"):
        results = ranks(2).run(
            compare_with_unsharded, name, sizes(2), steps=0, intermediate_size=width
        )
        check(results)


def test_inner_width_smaller_than_the_group(ranks: Pools) -> None:
    check(ranks(4).run(compare_with_unsharded, "llama", sizes(4), steps=0, intermediate_size=5))

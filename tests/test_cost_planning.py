"""Sizes, memory and advice on real models: published figures and the usual guidance."""

import json
from typing import Any

import pytest
import zoo

from fgtp_pass import ConfigError, Plan, make_plan
from fgtp_pass.cost.advice import choose_sizes
from fgtp_pass.cost.estimate import Cluster
from fgtp_pass.cost.hardware import load
from fgtp_pass.cost.memory import Load, latent_cache, tensor_parallel
from fgtp_pass.cost.report import Report, make_report
from fgtp_pass.cost.shape import component_shapes, precision
from fgtp_pass.cost.spelling import mindie, read_sizes, sglang, vllm_command
from fgtp_pass.models import summarize
from fgtp_pass.patterns import BUILTIN
from fgtp_pass.plan import itemsize
from fgtp_pass.summary import ComponentKey, ModelSummary
from fgtp_pass.tracing import _call, declared_quantization, plan_model

GIB = 2**30


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> ModelSummary:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FGTP_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        return summarize("deepseek-ai/DeepSeek-R1")


def published_case(deepseek: ModelSummary) -> Report:
    """vLLM-Ascend's measurement: 32 Ascend 910B, DP32 and EP32, w8a8, 24 sequences a rank."""
    return make_report(
        deepseek,
        load("ascend-910b-a2"),
        Load(batch=24, context=4096, quantization="w8a8"),
        data_parallel_size=32,
        ranks_per_node=8,
        asked=read_sizes("8", deepseek.keys),
    )


# published figures ------------------------------------------------------------------------------


def test_deepseek_r1_frees_what_vllm_ascend_published(deepseek: ModelSummary) -> None:
    saved = {row.component: row.bytes_saved_per_rank for row in published_case(deepseek).rows}
    arithmetic = {
        "oproj": 61 * 7168 * 16384 * 7 / 8,
        "lmhead": 129280 * 7168 * 2 * 7 / 8,
        "embedding": 129280 * 7168 * 2 * 7 / 8,
        "mlp": 3 * 3 * 7168 * 18432 * 7 / 8,
    }
    assert saved == pytest.approx(arithmetic)
    in_gib = {name: count / GIB for name, count in saved.items()}
    assert in_gib["oproj"] == pytest.approx(5.8, rel=0.01)
    assert in_gib["lmhead"] == pytest.approx(1.51, rel=0.01)
    assert in_gib["embedding"] == pytest.approx(1.51, rel=0.01)
    # printed as 0.9, which is 0.97 cut off after one digit
    assert in_gib["mlp"] == pytest.approx(0.97, rel=0.01)


def test_deepseek_r1_tpot_signs(deepseek: ModelSummary) -> None:
    """Published: o_proj +1.5 ms, lm_head -1.2, FFN -1.0, embedding -1.0 (not explained)."""
    change = {row.component: row.tpot_change_ms for row in published_case(deepseek).rows}
    assert change["lmhead"] == pytest.approx(-1.2, abs=0.3)
    assert change["mlp"] < 0
    assert change["oproj"] > 0  # at the estimated latency; it turns at 22 us (docs/cost-model.md)
    assert change["embedding"] > 0  # a lookup reads 24 rows, so there is nothing to gain


def test_all_61_layers_are_reported(deepseek: ModelSummary) -> None:
    rows = {row.component: row for row in published_case(deepseek).rows}
    assert {name: row.sites for name, row in rows.items()} == {
        "embedding": 1,
        "oproj": 61,
        "mlp": 3,
        "lmhead": 1,
    }
    assert rows["oproj"].messages_per_step == 122
    last = "model.layers.60.self_attn.o_proj.weight"
    assert any(site.weights[0].fqn == last for site in deepseek.plan.sites)
    assert deepseek.experts == 58 * 256 * 3 * 7168 * 2048


def test_routed_experts_lie_over_all_ranks(deepseek: ModelSummary) -> None:
    everything = 671_026_404_352  # parameters, counted by torch
    vocabulary, vectors = 2 * 129280 * 7168, deepseek.others - deepseek.linears
    experts = deepseek.experts
    report = published_case(deepseek)
    one_byte = everything - vocabulary - vectors - experts * 31 / 32
    assert report.whole.weight_bytes == one_byte + 2 * (vocabulary + vectors)
    saved = report.totals["bytes_saved_per_rank"]
    assert report.sharded.weight_bytes == report.whole.weight_bytes - saved


def test_latent_attention_is_advised_to_stay_data_parallel(deepseek: ModelSummary) -> None:
    load_of_rank = Load(batch=24, context=4096)
    cache = latent_cache(deepseek, load_of_rank, devices=32)
    assert cache is not None
    assert cache.data_parallel_bytes == 24 * 4096 * 61 * (512 + 64) * 2
    assert cache.tensor_parallel_bytes == 32 * cache.data_parallel_bytes
    recommended = published_case(deepseek).recommended
    assert recommended["attention"]["parallelism"] == "data"


# global tensor parallelism ----------------------------------------------------------------------


def dense(
    billions: float, layers: int, heads: int, kv_heads: int, head_dim: int = 128
) -> ModelSummary:
    """A dense model of published shape; where its weights are does not matter here."""
    return ModelSummary(
        name="dense",
        architecture="",
        dtype="bfloat16",
        layers=layers,
        attention_heads=heads,
        kv_heads=kv_heads,
        kv_width=2 * kv_heads * head_dim,
        latent=False,
        quantization=None,
        experts=0,
        linears=int(billions * 1e9),
        others=int(billions * 1e9),
        keys=tuple(
            ComponentKey(component=p.component, config_key=p.config_key, aliases=p.aliases)
            for p in BUILTIN
        ),
        plan=Plan(data_parallel_size=2),
    )


LLAMA_7B = dense(6.7, 32, 32, 32)
LLAMA_13B = dense(13.0, 40, 40, 40)
CODE_LLAMA_34B = dense(33.7, 48, 64, 8)
LLAMA_70B = dense(70.6, 80, 64, 8)
FALCON_180B = dense(179.5, 80, 232, 8, 64)
LLAMA_405B = dense(405.9, 126, 128, 8)


@pytest.mark.parametrize(
    ("model", "quantization", "size", "stages"),
    [
        (LLAMA_7B, None, 1, 1),
        (LLAMA_13B, None, 1, 1),
        (CODE_LLAMA_34B, None, 2, 1),
        (LLAMA_70B, None, 4, 1),  # two would hold the weights, without room for a KV cache
        (LLAMA_70B, "fp8", 2, 1),
        (FALCON_180B, None, 8, 1),
        (LLAMA_405B, "fp8", 8, 1),
        (LLAMA_405B, None, 8, 2),  # sixteen devices: more than the 8 KV heads can be cut into
    ],
)
def test_smallest_tensor_parallelism_on_80_gb(
    model: ModelSummary, quantization: str | None, size: int, stages: int
) -> None:
    found = tensor_parallel(model, Load(8, 4096, quantization), load("a100-80g"))
    assert (found.tensor_parallel_size, found.pipeline_parallel_size) == (size, stages)
    assert found.reason


def test_more_context_needs_more_devices() -> None:
    small = tensor_parallel(LLAMA_13B, Load(8, 4096), load("a100-80g"))
    large = tensor_parallel(LLAMA_13B, Load(32, 8192), load("a100-80g"))
    assert small.tensor_parallel_size < large.tensor_parallel_size


def test_heads_limit_tensor_parallelism() -> None:
    odd = dense(70.6, 80, 60, 6)  # 4 and 8 do not divide 6 KV heads
    found = tensor_parallel(odd, Load(8, 4096), load("a100-80g"))
    assert (found.tensor_parallel_size, found.pipeline_parallel_size) == (2, 2)


def test_pcie_links_stay_at_two() -> None:
    found = tensor_parallel(LLAMA_70B, Load(8, 4096), load("h100-pcie"))
    assert found.tensor_parallel_size == 2
    assert found.pipeline_parallel_size > 1
    assert "PCIe" in found.reason


# sizes ------------------------------------------------------------------------------------------


def shapes_of(name: str, **build: Any) -> Any:
    plan = make_plan(zoo.build(name, device="meta", **build), kwargs=_call(), data_parallel_size=2)
    return component_shapes(plan, "bfloat16")


def test_objectives(deepseek: ModelSummary) -> None:
    shapes = component_shapes(deepseek.plan, deepseek.dtype, "w8a8")
    cluster = Cluster(load("h200"), 32, 8)
    by = {
        objective: choose_sizes(shapes, cluster, 64, objective)
        for objective in ("latency", "balanced", "memory")
    }
    assert set(by["memory"].sizes.values()) == {8}  # within a node, losses or not
    for objective in ("latency", "balanced"):
        assert by[objective].sizes["embedding"] == 1
        for name, size in by[objective].sizes.items():
            if size > 1:
                assert cluster.change_seconds(shapes[name], size, 64) < 0
            assert by[objective].reasons[name]
    saved = {o: sum(shapes[n].bytes_saved(k) for n, k in c.sizes.items()) for o, c in by.items()}
    assert saved["latency"] <= saved["balanced"] <= saved["memory"]
    fastest = by["latency"].sizes["lmhead"]
    for size in (1, 2, 4, 8):
        assert cluster.change_seconds(shapes["lmhead"], fastest, 64) <= cluster.change_seconds(
            shapes["lmhead"], size, 64
        )


@pytest.mark.parametrize(
    ("data_parallel_size", "ranks_per_node", "largest"),
    [(32, 8, 8), (8, 4, 4), (6, 4, 2), (4, 1, 1)],
)
def test_groups_stay_within_a_node(
    deepseek: ModelSummary, data_parallel_size: int, ranks_per_node: int, largest: int
) -> None:
    shapes = component_shapes(deepseek.plan, deepseek.dtype)
    cluster = Cluster(load("h200"), data_parallel_size, ranks_per_node)
    assert set(choose_sizes(shapes, cluster, 8, "memory").sizes.values()) == {largest}


def test_tied_weights_are_counted_and_sized_once() -> None:
    shapes = shapes_of("gemma2")
    saved = {name: shape.bytes_saved(2) for name, shape in shapes.items()}
    assert sorted([saved["embedding"], saved["lmhead"]])[0] == 0
    choice = choose_sizes(shapes, Cluster(load("h200"), 8, 8), 8, "balanced")
    assert choice.sizes["embedding"] == choice.sizes["lmhead"]


# models -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma2", "deepseek_v3", "llama4"])
def test_one_layer_of_a_kind_stands_for_all(name: str) -> None:
    layers = 5
    extra: dict[str, Any] = {"num_hidden_layers": layers}
    if name == "gemma2":
        extra["layer_types"] = ["sliding_attention", "full_attention"] * 2 + ["full_attention"]
    model = zoo.build(name, device="meta", **extra)
    assert plan_model(model) == make_plan(model, kwargs=_call(), data_parallel_size=2)


def test_summaries_are_kept(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FGTP_CACHE_DIR", str(tmp_path))
    path = tmp_path / "config.json"
    path.write_text(json.dumps(zoo.config("llama").to_dict()))
    said: list[str] = []
    first = summarize(str(path), said.append)
    assert any("tracing" in line for line in said)
    said.clear()
    assert summarize(str(path), said.append) == first
    assert not said
    path.write_text(json.dumps(zoo.config("llama", num_hidden_layers=3).to_dict()))
    assert summarize(str(path)).layers == 3


@pytest.mark.parametrize(
    ("declared", "scheme"),
    [
        ({"quant_method": "fp8"}, "fp8"),
        ({"quant_method": "awq", "bits": 4}, "w4a16"),
        ({"quant_method": "gptq", "bits": 8}, "w8a16"),
        ({"quant_method": "unheard-of"}, "unheard-of"),
        (None, None),
    ],
)
def test_declared_quantization(declared: Any, scheme: str | None) -> None:
    assert declared_quantization({"quantization_config": declared}) == scheme
    if scheme == "unheard-of":
        with pytest.raises(ConfigError, match=r"unknown scheme 'unheard-of'.*fp8"):
            precision("bfloat16", scheme, "mlp")


def test_itemsizes_are_torchs() -> None:
    import torch

    for dtype in vars(torch).values():
        if isinstance(dtype, torch.dtype):
            name = str(dtype).removeprefix("torch.")
            assert itemsize(name) == dtype.itemsize, name


# spellings --------------------------------------------------------------------------------------

MINDIE = {"ModelConfig": [{"models": {"deepseekv2": {"parallel_options": {"o_proj_local_tp": 4}}}}]}


@pytest.mark.parametrize(
    ("text", "requested"),
    [
        ("8", {"oproj": 8, "mlp": 8, "lmhead": 8, "embedding": 8}),
        ("oproj=4, mlp=2", {"oproj": 4, "mlp": 2}),
        ("oproj_tensor_parallel_size=4", {"oproj": 4}),
        ("o_proj_local_tp=4,lm_head_local_tp=-1", {"oproj": 4}),
        ("--moe-dense-tp-size 2", {"mlp": 2}),
        ('{"finegrained_tp_config": {"mlp_tensor_parallel_size": 2}}', {"mlp": 2}),
        ('{"mlp_tensor_parallel_size": 2}', {"mlp": 2}),
        (json.dumps(MINDIE), {"oproj": 4}),
        (json.dumps({"ModelDeployConfig": MINDIE}), {"oproj": 4}),
        ("oproj=off", {}),
    ],
)
def test_sizes_in_any_systems_words(text: str, requested: dict[str, int]) -> None:
    assert read_sizes(text, BUILTIN).requested == requested


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("opproj=8", "Did you mean"),
        ("eight", "is no size"),
        ("{", "not JSON"),
        ('{"mlp": 2, "mlp_tensor_parallel_size": 4}', "mlp"),
    ],
)
def test_sizes_that_nobody_understands(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read_sizes(text, BUILTIN)


def test_the_vllm_command() -> None:
    command = vllm_command("some/model", 8, {"mlp": 8, "oproj": 1}, BUILTIN, expert_parallel=False)
    assert command == (
        "vllm serve some/model --data-parallel-size 8 "
        '--compilation-config \'{"passes": ["fgtp"]}\' '
        "--additional-config "
        '\'{"finegrained_tp_config": {"mlp_tensor_parallel_size": 8}}\''
    )
    assert "additional" not in vllm_command("m", 8, {}, BUILTIN, expert_parallel=True)


def test_equivalents_of_other_systems() -> None:
    sizes = {"oproj": 8, "lmhead": 1, "mlp": 4, "embedding": 8}
    assert mindie(sizes) == '{"parallel_options": {"o_proj_local_tp": 8}}'
    assert sglang(sizes, has_experts=True) == "--enable-dp-attention --moe-dense-tp-size 4"
    assert sglang(sizes, has_experts=False) == ""
    assert mindie({"mlp": 8}) == ""

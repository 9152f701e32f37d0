"""Sizes, memory and advice on real models: published figures and the usual guidance."""

import json
from typing import Any

import pytest
import zoo

from fgtp_pass import ConfigError, make_plan
from fgtp_pass.cost.advice import choose_sizes
from fgtp_pass.cost.estimate import Cluster
from fgtp_pass.cost.hardware import detect, load
from fgtp_pass.cost.layout import Deployment, Layout, Load
from fgtp_pass.cost.model_summary import ModelSummary
from fgtp_pass.cost.quantization import (
    SCHEMES,
)
from fgtp_pass.cost.report import Report, make_report
from fgtp_pass.cost.shape import component_shapes
from fgtp_pass.cost.spelling import read_sizes
from fgtp_pass.models.summarize import summarize
from fgtp_pass.models.trace_layers import decode_call, plan_model
from fgtp_pass.patterns import BUILTIN
from fgtp_pass.plan.plan import itemsize

pytestmark = pytest.mark.xdist_group("cost_planning")  # DeepSeek is summarised once

GIB = 2**30


def published_case(deepseek: ModelSummary) -> Report:
    """vLLM-Ascend's measurement: 32 Ascend 910B, DP32 and EP32, w8a8, 24 sequences a rank."""
    deployment = Deployment(
        deepseek, load("ascend-910b-a2"), Load(32 * 24, 4096, scheme=SCHEMES["w8a8"]), 8
    )
    return make_report(deployment, 32, asked=read_sizes("8", deepseek.keys))


# published figures ------------------------------------------------------------------------------


def test_deepseek_r1_frees_what_vllm_ascend_published(deepseek: ModelSummary) -> None:
    rows = published_case(deepseek).rows
    saved = {row.component: row.bytes_saved_per_rank for row in rows if row.group_size > 1}
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
    assert change["oproj"] == pytest.approx(1.5, abs=0.1)  # what HCCL's latency is fitted to
    assert change["embedding"] > 0  # a lookup reads 24 rows, so there is nothing to gain


def test_all_61_layers_are_reported(deepseek: ModelSummary) -> None:
    rows = {row.component: row for row in published_case(deepseek).rows}
    assert {name: row.sites for name, row in rows.items()} == {
        "embedding": 1,
        "oproj": 61,
        "mlp": 3,
        "lmhead": 1,
        "sharedexpert": 58,
        "qkv": 3 * 61,  # q_a and kv_a, q_b, kv_b
    }
    assert rows["oproj"].messages_per_step == 122
    last = "model.layers.60.self_attn.o_proj.weight"
    assert any(site.weights[0].fqn == last for site in deepseek.plan.sites)
    experts = deepseek.experts
    assert experts is not None
    assert experts.weights.elements == 58 * 256 * 3 * 7168 * 2048
    assert (experts.layers, experts.count, experts.active) == (58, 256, 8)


def test_routed_experts_lie_over_all_ranks(deepseek: ModelSummary) -> None:
    everything = 671_026_404_352  # parameters, counted by torch
    assert deepseek.experts is not None
    vocabulary, vectors = 2 * 129280 * 7168, deepseek.vectors
    experts = deepseek.experts.weights.elements
    report = published_case(deepseek)
    one_byte = everything - vocabulary - vectors - experts * 31 / 32
    memory = report.totals["memory_per_rank"]
    assert memory["weight_bytes_whole"] == one_byte + 2 * (vocabulary + vectors)
    saved = report.totals["bytes_saved_per_rank"]
    assert memory["weight_bytes"] == memory["weight_bytes_whole"] - saved


def test_a_latent_is_kept_by_every_device_of_tensor_parallelism(deepseek: ModelSummary) -> None:
    case = published_case(deepseek).deployment
    own = case.cache_bytes_of(Layout(1, 32, expert_parallel=True), 32 * 24)
    assert own == 24 * 4096 * 61 * (512 + 64) * 2
    assert case.cache_bytes_of(Layout(8, 4, expert_parallel=True), 32 * 24) == 8 * own


# sizes ------------------------------------------------------------------------------------------


def shapes_of(name: str, **build: Any) -> Any:
    plan = make_plan(
        zoo.build(name, device="meta", **build), kwargs=decode_call(), data_parallel_size=2
    )
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
    every = {f"{name}_tensor_parallel_size": 2 for name in (*zoo.COMPONENTS, *zoo.OPT_IN)}
    options = {"data_parallel_size": 2, "allow_missing": ["sharedexpert"]}
    found, _ = plan_model(model)
    joined = make_plan(model, kwargs=decode_call(), finegrained_tp_config=every, **options)
    assert found.cuts().keys() == joined.cuts().keys()
    assert found.left_alone == joined.left_alone
    alone = [
        site
        # the first two may be tied
        for apart in (("embedding", "lmhead"), ("oproj",), ("mlp",), ("sharedexpert",), ("qkv",))
        for site in make_plan(
            model,
            kwargs=decode_call(),
            finegrained_tp_config={f"{component}_tensor_parallel_size": 2 for component in apart},
            **options,
        ).sites
    ]
    assert sorted(found.sites, key=str) == sorted(alone, key=str)
    assert sum(len(site.collectives) for site in joined.sites) < sum(
        len(site.collectives) for site in alone
    )


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


def test_devices_are_known_by_their_own_names() -> None:
    for said, name in (
        ("NVIDIA H20", "h20"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA GB200", "gb200-nvl72"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA H100 80GB HBM3", "h100-sxm"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("AMD Instinct MI325X", "mi325x"),
    ):
        found = detect(said)
        assert found is not None, said
        assert found.name == name
    assert detect("NVIDIA T4") is None


@pytest.mark.parametrize(("kind", "gbps"), [("roce", 200), ("ethernet", 25), ("nvlink", None)])
def test_another_network_between_nodes(kind: str, gbps: float | None) -> None:
    given = load("h200")
    other = given.with_network(kind, gbps)
    assert other.across_nodes.kind == kind
    assert other.within_node == given.within_node
    bandwidth = other.across_nodes.shared_bandwidth
    assert bandwidth == (given.across_nodes.shared_bandwidth if gbps is None else gbps * 1e9 / 8)
    assert given.with_network(None, None) is given
    with pytest.raises(ConfigError, match=r"unknown kind 'infinband'.*'infiniband'"):
        given.with_network("infinband", None)


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

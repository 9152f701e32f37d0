"""Layouts at equal load: which wins, what fits, what is sure, and the commands."""

from dataclasses import replace
from typing import Any

import pytest
from deployments import of

from fgtp_pass.cost.advice import choose_sizes
from fgtp_pass.cost.compare import compare, freed, smallest_replica
from fgtp_pass.cost.hardware import load, profiles
from fgtp_pass.cost.layout import Layout
from fgtp_pass.cost.model_summary import AttentionKind, ComponentKey, ModelSummary, Weights
from fgtp_pass.cost.quantization import SCHEMES
from fgtp_pass.cost.report import make_report
from fgtp_pass.cost.uncertainty import groups, predict
from fgtp_pass.patterns import BUILTIN
from fgtp_pass.plan.plan import Plan

pytestmark = pytest.mark.usefixtures("kept_summaries")


# which wins -------------------------------------------------------------------------------------


def test_for_a_dense_model_plain_tensor_parallelism_wins(llama: ModelSummary) -> None:
    found = compare(of(llama, "h100-sxm", 128), 8)
    by_name = {option.name: option for option in found.options}
    assert found.best.name == "TP8"
    assert "does not need fgtp_pass" in found.verdict
    fine = by_name["DP8 + sizes"]
    assert fine.fits
    assert fine.tpot.mid > by_name["TP4 x 2 replicas"].tpot.mid > found.best.tpot.mid
    assert not by_name["8 replicas"].fits  # a whole model is nothing to compare with
    assert [o.fits for o in found.options] == sorted((o.fits for o in found.options), reverse=True)


def test_all_layouts_serve_the_same_load_with_all_devices(llama: ModelSummary) -> None:
    found = compare(of(llama, "h100-sxm", 128), 8)
    assert {option.sequences for option in found.options} == {128}
    assert {option.layout.devices for option in found.options} == {8}
    for option in found.options:
        assert option.throughput == pytest.approx(128 / option.tpot.mid / 8)
        assert sum(option.parts.values()) == pytest.approx(option.tpot.mid)


def test_for_latents_and_experts_data_parallel_attention_wins(deepseek: ModelSummary) -> None:
    case = of(deepseek, "ascend-910b-a2", 32 * 24, scheme=SCHEMES["w8a8"])
    found = compare(case, 32)
    assert found.best.name == "DP32 + EP + sizes"
    cut = next(o for o in found.options if o.name == "TP8 x DP4 + EP")
    assert cut.cache_bytes == pytest.approx(found.best.cache_bytes)  # a latent is not cut
    assert cut.parts["attention"] > 5 * found.best.parts["attention"]
    assert not cut.fits


def test_with_a_target_throughput_decides(deepseek: ModelSummary) -> None:
    case = of(deepseek, "h200", 512, output_tokens=1000)
    found = compare(case, 16, target=0.05)
    met = [option for option in found.options if option.meets_target]
    assert met == found.options[: len(met)]
    assert [o.throughput for o in met] == sorted((o.throughput for o in met), reverse=True)
    for option in met:
        assert option.tpot.mid <= 0.05
        more = option.sequences + option.layout.data_parallel_size
        slower = case.step_seconds(option.layout, more) > 0.05
        assert slower or more > option.most


def test_a_target_that_nobody_reaches(llama: ModelSummary) -> None:
    found = compare(of(llama, "h100-sxm", 128), 8, target=0.001)
    assert found.verdict.startswith("No layout reaches 1 ms per token; the nearest is ")


def test_what_freed_memory_buys(deepseek: ModelSummary) -> None:
    case = of(deepseek, "ascend-910b-a2", 32 * 24, 16384, scheme=SCHEMES["w8a8"])
    fine = compare(case, 32).best
    bought = freed(case, fine)
    assert bought is not None
    assert bought["max_sequences"] > bought["max_sequences_without"]
    room = (bought["max_sequences"] - bought["max_sequences_without"]) * fine.cache_bytes / 32
    assert room == pytest.approx(bought["bytes"], rel=0.1)
    rate, without = "tokens_per_second_per_device", "tokens_per_second_per_device_without"
    assert bought[rate] > bought[without]


# what fits --------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["balanced", "latency", "memory"])
@pytest.mark.parametrize("context", [4096, 16384])
def test_what_does_not_fit_is_not_recommended(
    deepseek: ModelSummary, objective: Any, context: int
) -> None:
    case = of(deepseek, "ascend-910b-a2", 32 * 24, context, scheme=SCHEMES["w8a8"])
    made = make_report(case, 32, objective=objective)
    assert made.choice.enough
    assert made.totals["memory_per_rank"]["fits"]
    assert made.comparison.best.fits
    assert case.fits(made.fine_grained, 32 * 24)


def test_the_smallest_loss_that_fits(deepseek: ModelSummary) -> None:
    """At 16k tokens the objective's sizes free too little, and the least harm is added."""
    case = of(deepseek, "ascend-910b-a2", 32 * 24, 16384, scheme=SCHEMES["w8a8"])
    made = make_report(case, 32)
    changes = {row.component: row.tpot_change_ms for row in made.rows}
    freed_ = {row.component: row.bytes_saved_per_rank for row in made.rows}
    assert changes["oproj"] > 0  # a loss, taken for memory
    assert "the smallest loss that fits" in made.choice.reasons["oproj"]
    needed = case.weight_bytes(made.data_parallel) - case.usable_bytes
    needed += case.cache_bytes_of(made.data_parallel, 32 * 24)
    assert sum(freed_.values()) >= needed
    for name, change in changes.items():
        if change > 0:  # none of the losses is for nothing
            assert sum(freed_.values()) - freed_[name] < needed


def test_nothing_fits(llama: ModelSummary) -> None:
    made = make_report(of(llama, "h100-sxm", 2048), 8)
    assert made.comparison.verdict.startswith("No layout has room for 2,048 sequences of 4,096")
    assert made.command.text == ""
    said = made.to_json()
    assert said["recommended"]["layout"] is None
    assert set(said["recommended"]["sizes"].values()) == {1}
    assert all(not layout["fits"] and not layout["command"] for layout in said["layouts"])
    tiny = make_report(of(llama, "a10", 1), 4)
    assert tiny.comparison.verdict.startswith("The weights do not fit under any layout")


def test_a_fuller_cache_holds_fewer_sequences(llama: ModelSummary) -> None:
    short, long = (of(llama, "h100-sxm", 8, n) for n in (4096, 8192))
    eight = of(llama, "h100-sxm", 8, 4096, cache_dtype="fp8")
    layout = Layout(8)
    assert short.max_sequences(layout) == pytest.approx(2 * long.max_sequences(layout), abs=2)
    assert eight.max_sequences(layout) == pytest.approx(2 * short.max_sequences(layout), abs=2)
    assert short.fits(layout, short.max_sequences(layout))
    assert not short.fits(layout, short.max_sequences(layout) + 1)


def test_layers_for_multi_token_prediction_take_memory(deepseek: ModelSummary) -> None:
    plain, draft = (of(deepseek, "h200", 16, draft=draft) for draft in (False, True))
    layout = Layout(1, 16, expert_parallel=True)
    assert draft.sequence_bytes(layout) == pytest.approx(plain.sequence_bytes(layout) * 62 / 61)
    more = draft.weight_bytes(layout) - plain.weight_bytes(layout)
    experts = 256 * 3 * 7168 * 2048 / 16
    rest = 2 * 7168**2 + deepseek.draft.linears.elements - 2 * 7168**2  # type: ignore[union-attr]
    assert more == pytest.approx(experts + rest)


# global tensor parallelism ----------------------------------------------------------------------


def dense(
    billions: float, layers: int, heads: int, kv_heads: int, head_dim: int = 128
) -> ModelSummary:
    """A dense model of published shape; where its weights are does not matter here."""
    return ModelSummary(
        name="dense",
        architecture="",
        model_type="",
        dtype="bfloat16",
        layers=layers,
        hidden=heads * head_dim,
        vocabulary=32000,
        attention_heads=heads,
        kv_heads=kv_heads,
        attention=(
            AttentionKind(
                layers=layers, heads=kv_heads, width=2 * kv_heads * head_dim,
                decode_flops=4 * heads * head_dim, prefill_flops=4 * heads * head_dim,
            ),
        ),
        latent=False,
        linears=Weights(elements=int(billions * 1e9)),
        vectors=0,
        keys=tuple(
            ComponentKey(
                component=p.component, config_key=p.config_key, aliases=p.aliases, opt_in=p.opt_in
            )
            for p in BUILTIN
        ),
        plan=Plan(data_parallel_size=2),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("model", "quantization", "size", "stages"),
    [
        (dense(6.7, 32, 32, 32), None, 1, 1),  # Llama 7B
        (dense(13.0, 40, 40, 40), None, 1, 1),  # 13B
        (dense(33.7, 48, 64, 8), None, 2, 1),  # Code Llama 34B
        (dense(70.6, 80, 64, 8), None, 4, 1),  # two would hold the weights without a KV cache
        (dense(70.6, 80, 64, 8), "fp8", 2, 1),
        (dense(179.5, 80, 232, 8, 64), None, 8, 1),  # Falcon 180B
        (dense(405.9, 126, 128, 8), "fp8", 8, 1),
        (dense(405.9, 126, 128, 8), None, 8, 2),  # sixteen devices: two nodes
    ],
)
def test_smallest_tensor_parallelism_on_80_gb(
    model: ModelSummary, quantization: str | None, size: int, stages: int
) -> None:
    """The guidance of vLLM's documentation, from the size of a model to its tensor parallelism."""
    scheme = None if quantization is None else SCHEMES[quantization]
    found = smallest_replica(of(model, "a100-80g", 8, scheme=scheme))
    assert (found.tensor_parallel_size, found.pipeline_parallel_size) == (size, stages)


def test_throughput_wants_the_fewest_devices_that_fit_latency_more() -> None:
    """Small models: replicas for throughput, tensor parallelism for latency."""
    small = compare(of(dense(6.7, 32, 32, 32), "h100-sxm", 8, 2048), 8)
    assert small.best.name == "TP8"  # one sequence of eight each
    busy = of(dense(6.7, 32, 32, 32), "h100-sxm", 512, 512)
    by_name = {option.name: option for option in compare(busy, 8, target=0.04).options}
    assert by_name["8 replicas"].throughput > by_name["TP8"].throughput


def test_tensor_parallelism_beyond_the_kv_heads_holds_copies() -> None:
    few = of(dense(33.7, 48, 64, 2), "h100-sxm", 64)
    two, eight = Layout(2, 4), Layout(8, 1)
    assert few.sequence_bytes(two) == few.sequence_bytes(eight)
    assert "TP8" in {option.name for option in compare(few, 8).options}


@pytest.mark.parametrize(("hardware", "most"), [("h100-sxm", 0.25), ("h100-pcie", 1.0)])
def test_what_each_degree_costs(llama: ModelSummary, hardware: str, most: float) -> None:
    """Published guidance: 5 to 10 % at two and up to 25 % at eight over NVLink, more over PCIe."""
    case = of(llama, hardware, 32, 1024)
    share = []
    for size in (2, 4, 8):
        parts = case.parts(Layout(size, 8 // size), 32)
        share.append(parts["tensor parallelism"] / sum(parts.values()))
    assert share == sorted(share)
    assert share[-1] < most
    if hardware == "h100-pcie":
        assert share[-1] > 0.3


def test_pipelines_where_no_replica_fits() -> None:
    found = compare(of(dense(405.9, 126, 128, 8), "h100-sxm", 8, 2048), 16)
    assert found.best.name == "TP8 x PP2"
    assert found.best.layout.devices == 16


# ranges -----------------------------------------------------------------------------------------


def test_every_prediction_has_a_range(llama: ModelSummary) -> None:
    case = of(llama, "h100-sxm", 128)
    for option in compare(case, 8).options:
        assert option.tpot.low < option.tpot.mid < option.tpot.high
    measured = case.hardware.model_copy(
        update={
            name: None if name.endswith("seconds") else getattr(case.hardware, name)
            for name in ("matmul_seconds", "layer_seconds")
        }
    )
    assert replace(case, hardware=measured).step(Layout(8), 8).mid < case.step(Layout(8), 8).mid


@pytest.mark.parametrize("name", list(profiles()))
def test_every_group_of_constants_has_a_spread(name: str) -> None:
    assert load(name).spreads.keys() == groups().keys()


def test_a_range_is_the_root_of_the_squares() -> None:
    memory, rate = (next(iter(groups()[name])) for name in ("memory bandwidth", "matmul rate"))

    def compute(scale: Any) -> float:
        return 10 + 3 * (scale.get(memory, 1) - 1) + 4 * (scale.get(rate, 1) - 1)

    found = predict(compute, {"memory bandwidth": 1.0, "matmul rate": 1.0})
    assert found.high == pytest.approx(15)
    assert found.low == pytest.approx(10 - (1.5**2 + 2**2) ** 0.5)
    assert next(iter(found.by_group)) == "matmul rate"
    assert found.certain
    assert not predict(lambda scale: compute(scale) - 10, {"matmul rate": 1.0}).certain


def test_a_size_whose_sign_is_not_certain_is_not_taken(deepseek: ModelSummary) -> None:
    case = of(deepseek, "ascend-910b-a2", 32, scheme=SCHEMES["w8a8"])
    cluster = case.cluster(Layout(1, 32, expert_parallel=True))
    close = []
    for tokens in (1, 8, 24, 60, 90, 120, 200):
        choice = choose_sizes(case.shapes, cluster, tokens, "balanced")
        for name, size in choice.sizes.items():
            change = cluster.change_range(case.shapes[name], size, tokens)
            assert size == 1 or change.high < 0
            if choice.reasons[name].startswith("too close to call"):
                assert size == 1
                close.append(name)
    assert {"oproj", "mlp", "lmhead"} <= set(close)  # between where it pays and where it does not
    forced = make_report(of(deepseek, "ascend-910b-a2", 32 * 24, 16384, scheme=SCHEMES["w8a8"]), 32)
    assert forced.choice.sizes["oproj"] > 1  # memory asks for it

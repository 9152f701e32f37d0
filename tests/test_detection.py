"""Every architecture: the exact weights per component, and the reason for everything else."""

from typing import Any

import pytest
import torch
import zoo
from decoding import sizes
from marks import architectures, typical
from ranks import Pools
from transformers.models.falcon import modeling_falcon

import fgtp_pass
from fgtp_pass import Plan

# category of a parameter (by its name, in the test only) -> what the reason must say
REASONS = {
    "qkv": ("qkv is off",),
    "router": ("router",),
    "expert": ("expert", "no matmul or lookup", "choices"),
    "sharedexpert": ("sharedexpert is off",),
    "shared_expert_gate": ("no component's definition",),
    "position_embedding": ("positions", "no vocabulary"),
    "norm": ("vector",),
    "other": ("vector", "no matmul", "does not use"),
}


def plan_of(
    name: str,
    attention: str = "sdpa",
    meta: bool = False,
    on: tuple[str, ...] = zoo.COMPONENTS,
    **call: Any,
) -> Plan:
    device = "meta" if meta else "cpu"
    model = zoo.build(name, attn_implementation=attention, device=device if meta else None)
    ids = torch.randint(0, model.config.vocab_size, (2, 7)).to(device)
    return fgtp_pass.make_plan(
        model,
        kwargs={"input_ids": ids, **call},
        finegrained_tp_config=sizes(**dict.fromkeys(on, 2)),
        data_parallel_size=2,
        allow_missing=missing(name, on),
    )


def missing(name: str, on: tuple[str, ...] = zoo.COMPONENTS) -> tuple[str, ...]:
    return tuple(c for c in on if not zoo.ARCHITECTURES[name].expected[c])


def weights_by_component(plan: Plan) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for site in plan.sites:
        found.setdefault(site.component, set()).update(w.fqn for w in site.weights)
    return found


def assert_expected(name: str, plan: Plan, on: tuple[str, ...] = zoo.COMPONENTS) -> None:
    expected = {c: set(f) for c, f in zoo.ARCHITECTURES[name].expected.items() if f and c in on}
    assert weights_by_component(plan) == expected


@pytest.mark.parametrize("name", architectures())
def test_sites_and_reasons(name: str) -> None:
    check_plan(name, (*zoo.COMPONENTS, *zoo.OPT_IN))


@pytest.mark.parametrize("name", typical())
def test_what_is_opt_in_is_off(name: str) -> None:
    check_plan(name, zoo.COMPONENTS)


def check_plan(name: str, on: tuple[str, ...]) -> None:
    plan = plan_of(name, use_cache=True, on=on)
    assert_expected(name, plan, on)
    categories = zoo.expected_left_alone(name, on)
    assert {left.fqn for left in plan.left_alone} == set(categories)
    for left in plan.left_alone:
        accepted = REASONS[categories[left.fqn]]
        assert any(word in left.reason for word in accepted), (left.fqn, left.reason)


@pytest.mark.parametrize("name", typical())
def test_sites_do_not_depend_on_how_the_model_is_called(name: str) -> None:
    assert_expected(name, plan_of(name, attention="eager", use_cache=False, logits_to_keep=1))
    assert_expected(name, plan_of(name, meta=True, use_cache=True))


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon", "deepseek_v3", "llama4"])
def test_sites_of_a_dynamic_graph(name: str) -> None:
    with torch._dynamo.config.patch(assume_static_by_default=False):
        assert_expected(name, plan_of(name, use_cache=True))


def test_a_transpose_as_torch_2_15_writes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        product = x @ torch.ops.aten.numpy_T(self.weight)
        return product if self.bias is None else product + self.bias

    monkeypatch.setattr(modeling_falcon.FalconLinear, "forward", forward)
    assert_expected("falcon", plan_of("falcon", use_cache=True))


def test_plans_need_no_names() -> None:
    """Renaming every module and parameter changes nothing but the names."""
    model = zoo.build("llama")
    ids = torch.zeros(1, 5, dtype=torch.long)
    options = {"finegrained_tp_config": sizes(2), "data_parallel_size": 2}
    plain = fgtp_pass.make_plan(model, kwargs={"input_ids": ids}, **options)
    layers = model.model.layers
    for layer in layers:  # swap what the names promise: up for gate, q for o
        layer.mlp.gate_proj, layer.mlp.up_proj = layer.mlp.up_proj, layer.mlp.gate_proj
    swapped = fgtp_pass.make_plan(model, kwargs={"input_ids": ids}, **options)
    assert weights_by_component(plain) == weights_by_component(swapped)


def test_plan_round_trips_through_json() -> None:
    plan = plan_of("deepseek_v3", use_cache=True)
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert again.fingerprint == plan.fingerprint
    assert str(again) == str(plan)


def test_plan_prints_as_a_table() -> None:
    text = str(plan_of("llama", use_cache=True))
    for word in ("embedding", "lmhead", "oproj", "mlp", "all_gather", "freed/rank", "total"):
        assert word in text


def test_bytes_saved_is_what_the_shapes_say() -> None:
    plan = plan_of("gpt2", use_cache=True)
    model = zoo.build("gpt2")
    named = dict(model.named_parameters())
    saved = 0
    for fqn, (cut, k) in plan.cuts().items():
        full = named[fqn]
        assert tuple(full.shape) == cut.shape
        padded = list(full.shape)
        assert cut.cut_dim is not None
        padded[cut.cut_dim] = -(-padded[cut.cut_dim] // k)
        saved += (full.numel() - torch.Size(padded).numel()) * 4
    assert plan.bytes_saved_per_rank == saved


class Broken(torch.nn.Module):
    """A decoder that Dynamo compiles in several pieces, a layer's attention and FFN apart."""

    def __init__(self) -> None:
        super().__init__()
        self.model = zoo.build("llama")
        for layer in self.model.model.layers:
            layer.mlp.register_forward_pre_hook(lambda *_: torch._dynamo.graph_break())
        self.config = self.model.config

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits


def test_a_model_that_dynamo_splits_keeps_all_its_layers() -> None:
    plan = fgtp_pass.make_plan(
        Broken(),
        args=(torch.zeros(1, 5, dtype=torch.long),),
        finegrained_tp_config=sizes(oproj=2, mlp=2),
        data_parallel_size=2,
    )
    found = weights_by_component(plan)
    expected = zoo.ARCHITECTURES["llama"].expected
    assert found["oproj"] == {f"model.{fqn}" for fqn in expected["oproj"]}
    assert found["mlp"] == {f"model.{fqn}" for fqn in expected["mlp"]}


@torch.no_grad()
def _split_model_in_ranks() -> None:
    from decoding import relative_errors

    model = Broken()
    ids = torch.randint(0, 160, (2, 5))
    want = model(ids)
    fast = torch.compile(
        model,
        backend=fgtp_pass.fgtp_backend,
        options={
            "finegrained_tp_config": sizes(2),
            "inner_backend": "eager",
            "allow_missing": ["embedding", "lmhead", "oproj", "mlp"],
        },
    )
    for _ in range(2):
        assert relative_errors(fast(ids), want)[0] < 1e-5
    plan = fgtp_pass.applied_plan(fast)
    assert plan is not None
    expected = zoo.ARCHITECTURES["llama"].expected
    assert weights_by_component(plan)["mlp"] == {f"model.{fqn}" for fqn in expected["mlp"]}
    assert weights_by_component(plan)["oproj"] == {f"model.{fqn}" for fqn in expected["oproj"]}
    fgtp_pass.idle_step(fast)  # every rank idles, in every piece


def test_a_model_that_dynamo_splits_runs(ranks: Pools) -> None:
    ranks(2).run(_split_model_in_ranks)

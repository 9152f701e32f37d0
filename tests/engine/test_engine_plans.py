"""Which layers of vLLM's own model classes are sharded; parameter names give the other answer."""

from pathlib import Path
from typing import Any

import pytest
import zoo
from planning import Planned, plan_all
from random_checkpoints import PLANNED, UNPLANNED, Checkpoint
from ranks import free_port

SIX = (*zoo.COMPONENTS, *zoo.OPT_IN)


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory, engines: Any) -> dict[str, Planned]:
    """The plan of every model, made in one process."""
    folder: Path = tmp_path_factory.mktemp("configs")
    every: dict[str, Checkpoint] = PLANNED | UNPLANNED
    names = sorted(every, key=lambda name: name != "mixtral")  # see plan_all
    folders = {name: every[name].write(folder / name, weights=False) for name in names}
    components = {name: every[name].components + every[name].opt_in for name in names}
    return engines(1).run(plan_all, folders, components, free_port())[0]


@pytest.mark.parametrize("name", PLANNED)
def test_sites(planned: dict[str, Planned], name: str) -> None:
    plan = planned[name]
    assert not plan.error
    assert set(plan.sites) == {*PLANNED[name].components, *PLANNED[name].opt_in}
    for component, weights in plan.sites.items():
        for fqn in weights:
            tied = component == "lmhead" and zoo.categorize(fqn) == "embedding"
            assert tied or zoo.categorize(fqn) == component, fqn
    missed = {fqn: why for fqn, why in plan.left.items() if zoo.categorize(fqn) in SIX}
    absorbed = {fqn for fqn, why in missed.items() if "takes it apart when it is loaded" in why}
    assert missed.keys() == absorbed
    assert all("kv_b_proj" in fqn for fqn in absorbed)
    assert bool(absorbed) == name.startswith("deepseek")


@pytest.mark.parametrize(("name", "model_class"), [("bloom", "Bloom"), ("nemotron", "Nemotron")])
def test_a_model_that_cannot_be_traced_is_refused(
    planned: dict[str, Planned], name: str, model_class: str
) -> None:
    assert f"{model_class}ForCausalLM cannot be planned" in planned[name].error
    assert "runs unsharded" in planned[name].error


def test_blocks_that_shards_would_cut(tmp_path: Path, engines: Any) -> None:
    """fp8 in blocks of 64: latents of 48 stay whole, and what is made of them is cut."""
    names = ("deepseek_v3", "qwen3")
    folders = {name: PLANNED[name].write(tmp_path / name, weights=False) for name in names}
    asked = dict.fromkeys(names, ("qkv",))
    (plans,) = engines(1).run(plan_all, folders, asked, free_port(), 64)
    layers = range(3)
    cut = {f"model.layers.{i}.self_attn.q_b_proj.weight" for i in layers}
    assert plans["deepseek_v3"].sites == {"qkv": cut}
    for i in layers:
        why = plans["deepseek_v3"].left[f"model.layers.{i}.self_attn.fused_qkv_a_proj.weight"]
        assert "quantised in blocks of 64 outputs" in why
    assert "qkv_proj.weight: it is quantised in blocks" in plans["qwen3"].error


def test_what_tensor_parallel_ranks_hold_more_than_once(tmp_path: Path, engines: Any) -> None:
    """Two heads of k and v on four ranks, and shared experts on two."""

    def plan(name: str, component: str, **parallel: Any) -> Planned:
        folders = {name: PLANNED[name].write(tmp_path / name, weights=False)}
        (plans,) = engines(1).run(plan_all, folders, {name: (component,)}, free_port(), 0, parallel)
        return plans[name]

    heads = plan("mixtral", "qkv", tensor_parallel_size=4)
    assert "2 heads of k and v for 4 tensor-parallel ranks" in heads.error
    both = {"tensor_parallel_size": 2, "data_parallel_size": 2, "enable_expert_parallel": True}
    experts = plan("qwen2_moe", "sharedexpert", **both)
    assert "every tensor-parallel rank holds the shared ones whole" in experts.error


def test_stages_have_their_own_layers(tmp_path: Path, engines: Any) -> None:
    """A dense layer on the first of two stages alone, and a table that both have."""
    names = ("deepseek_v3", "qwen3", "gpt2")
    folders = {name: PLANNED[name].write(tmp_path / name, weights=False) for name in names}
    asked = {name: PLANNED[name].components + PLANNED[name].opt_in for name in names}

    def plan(*stage: int) -> dict[str, Planned]:
        return engines(1).run(plan_all, folders, asked, free_port(), 0, None, stage)[0]

    whole, first, last = plan(0, 1), plan(0, 2), plan(1, 2)
    for name in names:
        assert not first[name].error
        assert not last[name].error
        assert "lmhead" not in first[name].sites
        assert "embedding" not in last[name].sites
        for component, weights in whole[name].sites.items():
            here, there = (p[name].sites.get(component, set()) for p in (first, last))
            assert here | there == weights
            assert not here & there
    assert "mlp" not in last["deepseek_v3"].sites
    assert first["qwen3"].sites["embedding"] == last["qwen3"].sites["lmhead"]
    left = [set(p["deepseek_v3"].left) for p in (whole, first, last)]
    assert left[1] | left[2] == left[0]
    assert left[1] < left[0]

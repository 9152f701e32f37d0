"""Which layers of vLLM's own model classes are sharded; parameter names give the other answer."""

from pathlib import Path
from typing import Any

import pytest
import zoo
from planning import Planned, plan_all
from random_checkpoints import PLANNED, UNPLANNED, Checkpoint
from ranks import free_port


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory, engines: Any) -> dict[str, Planned]:
    """The plan of every model, made in one process."""
    folder: Path = tmp_path_factory.mktemp("configs")
    every: dict[str, Checkpoint] = PLANNED | UNPLANNED
    names = sorted(every, key=lambda name: name != "mixtral")  # see plan_all
    folders = {name: every[name].write(folder / name, weights=False) for name in names}
    components = {name: every[name].components for name in names}
    return engines(1).run(plan_all, folders, components, free_port())[0]


@pytest.mark.parametrize("name", PLANNED)
def test_sites(planned: dict[str, Planned], name: str) -> None:
    plan = planned[name]
    assert not plan.error
    assert set(plan.sites) == set(PLANNED[name].components)
    for component, weights in plan.sites.items():
        for fqn in weights:
            tied = component == "lmhead" and zoo.categorize(fqn) == "embedding"
            assert tied or zoo.categorize(fqn) == component, fqn
    missed = {fqn: why for fqn, why in plan.left.items() if zoo.categorize(fqn) in zoo.COMPONENTS}
    assert not missed


@pytest.mark.parametrize(("name", "model_class"), [("bloom", "Bloom"), ("nemotron", "Nemotron")])
def test_a_model_that_cannot_be_traced_is_refused(
    planned: dict[str, Planned], name: str, model_class: str
) -> None:
    assert f"{model_class}ForCausalLM cannot be planned" in planned[name].error
    assert "runs unsharded" in planned[name].error

"""Models that read images: the table of words is read before the model, outside the graph, at
another count of tokens on each rank, beside encoders that only some ranks run in a step.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from engines import COMPONENTS, Answer, Job, merged, shared
from marks import full
from multimodal import (
    ENVIRONMENT,
    OPTIONS,
    WRITERS,
    embeddings_as_images,
    generate_from_images,
    with_images,
)
from planning import plan_all
from random_checkpoints import parts, prompts
from ranks import free_port
from test_engine_tokens import assert_same

GIVEN = prompts() | {4: prompts()[1]}  # the same words beside other images
EMBEDDED = {"limit_mm_per_prompt": {"image": 0, "video": 0}, "enable_mm_embeds": True}


@pytest.fixture(scope="module")
def whole(engines: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """`whole(name)`: the `Job` of a model, and what one unsharded rank makes of it."""
    found: dict[str, tuple[Job, Answer]] = {}

    def of(name: str, run: Any = generate_from_images, **options: Any) -> tuple[Job, Answer]:
        key = f"{name} {options}"
        if key not in found:
            folder = tmp_path_factory.getbasetemp() / name
            model = str(folder) if folder.exists() else WRITERS[name](folder)
            given = with_images(GIVEN) if run is not None else GIVEN
            job = Job(model, given, merged(OPTIONS, options), ENVIRONMENT, run=run)
            found[key] = job, engines(1)(replace(job, options=eager(job)))[0]
        return found[key]

    return of


def eager(job: Job) -> dict[str, Any]:
    return merged(job.options, {"enforce_eager": True})


def on_two_ranks(engines: Any, job: Job, runner: str) -> list[Answer]:
    options = merged(job.options, shared())
    answers: list[Answer] = engines(2, runner)(
        *[
            replace(job, prompts={i: job.prompts[i] for i in part}, options=options)
            for part in parts(len(job.prompts), 2)
        ]
    )
    return answers


@pytest.mark.parametrize(
    ("name", "runner"),
    [
        ("llava", "v1"),
        ("qwen2_5_vl", "v1"),
        pytest.param("llava", "v2", marks=full),
        pytest.param("qwen2_5_vl", "v2", marks=full),
    ],
)
def test_images(engines: Any, whole: Callable[..., Any], name: str, runner: str) -> None:
    job, want = whole(name)
    assert want.tokens[1][:6] != want.tokens[4]  # images are looked at
    got = on_two_ranks(engines, job, runner)
    assert_same(want, got)
    for answer in got:
        (found,) = answer.found
        assert {component for component, _, _ in found["sites"]} == set(COMPONENTS)
        weights = [fqn for _, _, fqns in found["sites"] for fqn in fqns]
        assert all(fqn.startswith("language_model.") for fqn in weights)
        assert found["bytes"] == want.found[0]["bytes"] - found["saved"]


def test_embeddings_of_images(engines: Any, whole: Callable[..., Any]) -> None:
    """They come with the request, and the encoder has no weights."""
    job, want = whole("llava", embeddings_as_images, **EMBEDDED)
    assert want.tokens[1][:6] != want.tokens[4]
    assert_same(want, on_two_ranks(engines, job, "v1"))


@full
def test_without_images(engines: Any, whole: Callable[..., Any]) -> None:
    """As a model of words alone, whose graph reads the table."""
    nothing = {"limit_mm_per_prompt": {"image": 0, "video": 0}}
    job, want = whole("qwen2_5_vl", None, **nothing)
    assert_same(want, on_two_ranks(engines, job, "v1"))


def _plan(folders: dict[str, str], port: int) -> Any:
    os.environ |= ENVIRONMENT
    return plan_all(folders, dict.fromkeys(folders, COMPONENTS), port)


def test_encoders_stay_whole(engines: Any, tmp_path: Path) -> None:
    folders = {name: write(tmp_path / name, weights=False) for name, write in WRITERS.items()}
    (plans,) = engines(1).run(_plan, folders, free_port())
    for name, tower in (("llava", "vision_tower."), ("qwen2_5_vl", "visual.")):
        assert not plans[name].error
        assert set(plans[name].sites) == set(COMPONENTS)
        reasons = {why for fqn, why in plans[name].left.items() if fqn.startswith(tower)}
        (reason,) = reasons
        assert "outside the language model, in an encoder" in reason

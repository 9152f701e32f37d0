"""Fixtures of the tests with real vLLM engines. Without vLLM installed, they are skipped."""

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
from checkpoints import CHECKPOINTS, Checkpoints, parts, prompts
from engines import Answer, Engines, Job, install_test_plugin, merged


@pytest.fixture(scope="session", autouse=True)
def _vllm() -> None:
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return Checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="session")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], Engines]]:
    """`engines(n)(*jobs)`: n ranks run a job each. Ranks are kept; one world size at a time."""
    kept: dict[int, Engines] = {}

    def of(world: int) -> Engines:
        if world not in kept or not kept[world].alive:
            close()
            folder = tmp_path_factory.mktemp(f"engines{world}_")
            install_test_plugin(folder)
            kept[world] = Engines(world, folder)
        return kept[world]

    def close() -> None:
        for pool in kept.values():
            pool.kill()
        kept.clear()

    yield of
    close()


@pytest.fixture(scope="session")
def unsharded(
    tmp_path_factory: pytest.TempPathFactory, checkpoint: Checkpoints
) -> Iterator[Callable[..., Answer]]:
    """`unsharded(name)`: what one rank alone gives for all prompts; one process runs them all.

    Its options are those of `LLM`, and `job` replaces fields of the `Job`.
    """
    answers: dict[str, Answer] = {}
    folder = tmp_path_factory.mktemp("unsharded_")
    install_test_plugin(folder)
    alone = Engines(1, folder)

    def of(name: str, job: Mapping[str, Any] | None = None, **options: Any) -> Answer:
        nonlocal alone
        key = f"{name} {job} {options}"
        if key not in answers:
            if not alone.alive:
                alone = Engines(1, folder)
            plain = Job(
                checkpoint(name),
                prompts(),
                merged(CHECKPOINTS[name].options, {"enforce_eager": True}, options),
                {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
            )
            answers[key] = alone(replace(plain, **(job or {})))[0]
        return answers[key]

    yield of
    alone.kill()


@pytest.fixture
def sharded(engines: Any, checkpoint: Checkpoints) -> Callable[..., list[Answer]]:
    """`sharded(name, options)`: what each of two ranks gives for its part of the prompts."""

    def run(name: str, options: dict[str, Any], world: int = 2, **more: Any) -> list[Answer]:
        given = prompts()
        environment = more.pop("environment", {})
        jobs = [
            Job(
                checkpoint(name),
                {i: given[i] for i in part},
                merged(CHECKPOINTS[name].options, options),
                environment,
            )
            for part in parts(len(given), world)
        ]
        return engines(world)(*jobs, **more)

    return run

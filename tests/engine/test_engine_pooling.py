"""Models that end in a vector of each prompt: no lm_head, and the rest shared as elsewhere."""

from __future__ import annotations

import functools
import time
from pathlib import Path
from typing import Any

import pytest
from engines import Job, merged, probe, run_rank, shared
from marks import full
from random_checkpoints import Checkpoints, parts, prompts, write_tokenizer
from ranks import HANG, free_port

SHARED = ("embedding", "oproj", "mlp")
SMALL: dict[str, Any] = {"runner": "pooling", "max_num_seqs": 2, "max_num_batched_tokens": 32}
SMALL |= {"skip_tokenizer_init": False}  # vLLM asks for a tokenizer here


def _embed(llm: Any, job: Job) -> dict[str, Any]:
    numbers = sorted(job.prompts)
    given = [{"prompt_token_ids": list(job.prompts[i])} for i in numbers]
    outputs = llm.embed(given, use_tqdm=False)
    vectors = [output.outputs.embedding for output in outputs]
    (found,) = llm.apply_model(probe)
    return found | {"vectors": dict(zip(numbers, vectors, strict=True))}


@pytest.fixture(scope="module")
def whole(engines: Any, checkpoint: Checkpoints) -> dict[str, Any]:
    write_tokenizer(Path(checkpoint("qwen3")))
    options = SMALL | {"enforce_eager": True}
    found: dict[str, Any] = engines(1)(Job(checkpoint("qwen3"), prompts(), options, run=_embed))[0]
    return found


@pytest.mark.parametrize("runner", ["v1", pytest.param("v2", marks=full)])
def test_vectors(engines: Any, checkpoint: Checkpoints, whole: dict[str, Any], runner: str) -> None:
    """In several steps, so that a rank is done before the other."""
    given, options = prompts(), merged(SMALL, shared(*SHARED))
    got = engines(2, runner)(
        *[
            Job(
                checkpoint("qwen3"),
                {i: given[i] for i in part},
                options,
                run=_embed,
                processes="fork",
            )
            for part in parts(len(given), 2)
        ]
    )
    assert sorted(i for one in got for i in one["vectors"]) == sorted(given)
    for one in got:
        for i, vector in one["vectors"].items():
            assert vector == pytest.approx(whole["vectors"][i], abs=1e-5)
        assert {component for component, _, _ in one["sites"]} == set(SHARED)
        assert one["bytes"] == whole["bytes"] - one["saved"]


def _embed_slowly(llm: Any, job: Job) -> dict[str, Any]:
    """What is added is done long before the next is added."""
    engine = llm.llm_engine
    stock = engine.add_request

    def add_request(*args: Any, **kwargs: Any) -> Any:
        added = stock(*args, **kwargs)
        time.sleep(1.0)
        return added

    engine.add_request = add_request
    return _embed(llm, job)


def test_a_rank_that_adds_its_prompts_slowly(
    engines: Any, checkpoint: Checkpoints, whole: dict[str, Any]
) -> None:
    """The other has a single prompt, and does not leave before this one is through."""
    given, options = prompts(), merged(SMALL, shared(*SHARED))
    own = {0: {0: given[0], 1: given[1], 2: given[2]}, 1: {3: given[3]}}
    jobs = [
        Job(checkpoint("qwen3"), mine, options, run=run, processes="fork")
        for mine, run in zip(own.values(), (_embed_slowly, _embed), strict=True)
    ]
    for mine, got in zip(own.values(), engines(2)(*jobs), strict=True):
        assert {*got["vectors"]} == {*mine}
        for i, vector in got["vectors"].items():
            assert vector == pytest.approx(whole["vectors"][i], abs=1e-5)


def _add_and_wait(llm: Any, job: Job, done: Path) -> int:
    """Requests are added, and nobody asks for what becomes of them until the other rank is done."""
    from vllm import PoolingParams

    engine = llm.llm_engine
    for i, ids in job.prompts.items():
        engine.add_request(str(i), {"prompt_token_ids": ids}, PoolingParams(task="embed"))
    deadline = time.monotonic() + HANG
    while not done.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    finished = 0
    while engine.has_unfinished_requests():
        finished += len(engine.step())
    return finished


def _embed_and_say(llm: Any, job: Job, done: Path) -> int:
    finished = len(_embed(llm, job)["vectors"])
    done.touch()
    return finished


def test_a_rank_that_adds_prompts_and_then_does_nothing(
    engines: Any, checkpoint: Checkpoints, tmp_path: Path
) -> None:
    """The other rank is done after `timeout_seconds`, and so is this one, once it goes on."""
    given = prompts()
    options = merged(SMALL, shared(*SHARED, fgtp_options={"timeout_seconds": 15}))
    jobs = [
        Job(
            checkpoint("qwen3"),
            {i: given[i]},
            options,
            run=functools.partial(run, done=tmp_path / "done"),
            processes="fork",
        )
        for i, run in enumerate((_embed_and_say, _add_and_wait))
    ]
    assert engines(2)(*jobs) == [1, 1]


def test_prompts_that_are_kept_back_are_not_told(engines: Any, checkpoint: Checkpoints) -> None:
    """Within one process vLLM's `LLM` asks other ranks whether to go on, but not at each step."""
    job = Job(checkpoint("qwen3"), {0: prompts()[0]}, merged(SMALL, shared(*SHARED)), run=_embed)
    for outcome in engines(2).outcomes(run_rank, (job, job), free_port()):
        assert outcome.error == "ConfigError", outcome
        assert "VLLM_ENABLE_V1_MULTIPROCESSING=0" in outcome.message

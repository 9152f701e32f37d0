"""All ranks from one process: `LLM(data_parallel_size=2)` and `AsyncLLM`."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
from engines import (
    Answer,
    Engines,
    Job,
    answer_of,
    engine_arguments,
    merged,
    probe,
    sampling,
    set_environment,
    shared,
)
from random_checkpoints import Checkpoints, prompts
from ranks import HANG
from test_engine_tokens import assert_same

TWO_RANKS = {"data_parallel_size": 2}
MANY = 32


def _staggered(llm: Any, job: Job) -> Answer:
    """Requests come between steps, some are given up, and the last come alone, after a rest."""
    engine, finished = llm.llm_engine, {}

    def ask(name: str, i: int, **more: Any) -> None:
        prompt = {"prompt_token_ids": list(job.prompts[i])}
        engine.add_request(name, prompt, sampling(i, **more))

    def step() -> None:
        for output in engine.step():
            if output.finished and not output.request_id.startswith("given up"):
                finished[int(output.request_id)] = output

    def to_the_end() -> None:
        while engine.has_unfinished_requests():
            step()

    *early, last, very_last = sorted(job.prompts)
    for i in early:
        ask(str(i), i)
        if i % 5 == 0:
            ask(f"given up {i}", i, max_tokens=60)
        step()
        if i % 5 == 3:
            engine.abort_request([f"given up {i - 3}"])
    engine.abort_request([f"given up {i}" for i in early])
    to_the_end()
    for i in (last, very_last):
        time.sleep(1)  # the engines come to rest
        ask(str(i), i)
        to_the_end()
    return answer_of(finished, llm.apply_model(probe))


def test_staggered_requests_with_aborts(
    engines: Callable[[int], Engines], checkpoint: Checkpoints, unsharded: Callable[..., Answer]
) -> None:
    given = {"prompts": prompts(MANY)}
    job = Job(
        checkpoint("llama"),
        prompts(MANY),
        merged(shared(), TWO_RANKS),
        run=_staggered,
        processes="spawn",
    )
    (got,) = engines(1)(job)
    assert_same(unsharded("llama", given), [got])
    first, second = got.found  # one worker of each rank
    assert first == second
    assert first["saved"] > 0


def _what_it_says(llm: Any, job: Job) -> Any:
    raise AssertionError("the engine started")


@pytest.mark.parametrize(
    ("options", "environment", "said"),
    [
        (TWO_RANKS, {}, "not supported for single-process usage"),  # vLLM's own words
        (merged(shared(), TWO_RANKS), {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}, "one process per"),
        (merged(shared(), TWO_RANKS), {"VLLM_DP_SIZE": "2"}, "this process is one of them"),
    ],
    ids=["without_the_pass", "without_processes", "as_one_of_the_ranks"],
)
def test_refused(
    engines: Callable[[int], Engines],
    checkpoint: Checkpoints,
    options: dict[str, Any],
    environment: dict[str, str],
    said: str,
) -> None:
    job = Job(checkpoint("llama"), {}, options, environment, run=_what_it_says, processes="fork")
    with pytest.raises(AssertionError, match=said):
        engines(1)(job)


def _asynchronous(job: Job) -> Answer:
    set_environment(job)
    return asyncio.run(_stream_all(job))


async def _stream_all(job: Job) -> Answer:
    """Every prompt streamed, all at once, beside requests whose clients go away."""
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**engine_arguments(job)))

    async def stream(i: int, name: str, **more: Any) -> Any:
        prompt = {"prompt_token_ids": list(job.prompts[i])}
        parts = [part async for part in engine.generate(prompt, sampling(i, **more), name)]
        assert len(parts) > 1
        return parts[-1]

    try:
        leaving = [
            asyncio.create_task(stream(i, f"left {i}", max_tokens=60)) for i in range(0, MANY, 5)
        ]
        staying = [asyncio.create_task(stream(i, str(i))) for i in job.prompts]
        await asyncio.sleep(0.3)
        for task in leaving:
            task.cancel()
        outputs = await asyncio.gather(*staying)
        found = await engine.collective_rpc("apply_model", args=(probe,))
    finally:
        engine.shutdown()
    return answer_of(dict(zip(job.prompts, outputs, strict=True)), found)


def test_async_llm(
    engines: Callable[[int], Engines], checkpoint: Checkpoints, unsharded: Callable[..., Answer]
) -> None:
    options = merged(shared(), TWO_RANKS)
    job = Job(checkpoint("llama"), prompts(MANY), options, processes="fork")
    (got,) = engines(1).run(_asynchronous, job)
    assert_same(unsharded("llama", {"prompts": prompts(MANY)}), [got])
    assert got.found[0]["saved"] > 0


def test_the_check_of_an_unknown_version() -> None:
    """`python -m fgtp_pass.vllm.check` serves the same tokens with the pass and without."""
    environment = os.environ | {"VLLM_CPU_CI_ENV": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "fgtp_pass.vllm.check"]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=HANG, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]
    names, tokens = [line for line in done.stdout.splitlines() if line.startswith("ok:")]
    assert "every private name" in names
    assert "two ranks planned, sharded and served" in tokens

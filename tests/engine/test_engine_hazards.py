"""What must not hang: ranks without work, requests that are given up, ranks that differ.

Ranks that die, stop or raise are in test_engine_faults.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from engines import Answer, Engines, Job, generate, merged, run_rank, shared
from random_checkpoints import Checkpoints, prompts
from ranks import free_port
from test_engine_tokens import assert_same

Run = Callable[..., Any]


def jobs(model: str, parts: list[list[int]], **options: Any) -> list[Job]:
    given = prompts()
    return [Job(model, {i: given[i] for i in part}, merged(shared(), options)) for part in parts]


def test_a_rank_that_idles_nearly_all_the_time(
    engines: Callable[[int], Engines], checkpoint: Checkpoints, unsharded: Run
) -> None:
    """One request on one rank; vLLM's SPMD way needs one on each, or a rank never joins."""
    first, second = jobs(checkpoint("llama"), [list(prompts())[1:], [0]])
    assert_same(unsharded("llama"), engines(2)(first, second))


def test_a_first_step_of_one_token(
    engines: Callable[[int], Engines], checkpoint: Checkpoints, unsharded: Run
) -> None:
    """On all ranks. The graph of an engine that does not warm up would be traced by it."""
    given, want = prompts(), unsharded("llama")
    parts = {0: given[0][:1], 1: given[1], 2: given[2]}, {3: given[3][:1], 4: given[4]}
    options = merged(shared(), {"max_num_seqs": 1})
    first, second = engines(2)(*[Job(checkpoint("llama"), part, options) for part in parts])
    tokens = first.tokens | second.tokens
    assert [tokens[i] for i in (1, 2, 4)] == [want.tokens[i] for i in (1, 2, 4)]


def test_a_rank_that_must_plan_beside_one_that_need_not(
    engines: Callable[[int], Engines], checkpoint: Checkpoints, unsharded: Run, tmp_path: Path
) -> None:
    first, second = jobs(checkpoint("llama"), [[0, 1, 2, 3], [4, 5, 6]])
    engines(2)(first, second)  # both have the plan now
    forgetful = replace(second, environment={"FGTP_CACHE_DIR": str(tmp_path)})
    assert_same(unsharded("llama"), engines(2)(first, forgetful))


def _started(llm: Any, job: Job, tokens: int) -> Any:
    """The engine with all requests of the job added, to be stepped by hand."""
    from vllm import SamplingParams

    for i, ids in job.prompts.items():
        llm.llm_engine.add_request(
            str(i),
            {"prompt_token_ids": list(ids)},
            SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False),
        )
    return llm.llm_engine


def _with_aborts(llm: Any, job: Job) -> Answer:
    """One rank's requests are given up after some steps; then all run again, to the end."""
    engine = _started(llm, job, tokens=60)
    for step in range(200):
        if not engine.has_unfinished_requests():
            break
        engine.step()
        if step == 4 and os.environ["FGTP_TEST_RANK"] == "0":
            engine.abort_request([str(i) for i in job.prompts])
    return generate(llm, job)


def test_abort_mid_flight(
    engines: Callable[[int], Engines], checkpoint: Checkpoints, unsharded: Run
) -> None:
    both = jobs(checkpoint("llama"), [[0, 1, 2, 3], [4, 5, 6]])
    got = engines(2)(*[replace(job, run=_with_aborts) for job in both])
    assert_same(unsharded("llama"), got)


@pytest.mark.parametrize(
    ("options", "differ"),
    [
        (shared("mlp"), "differ in plan"),
        (merged(shared(), {"enforce_eager": True}), "differ in compilation mode"),
        (
            merged(shared(), {"enable_prompt_embeds": True}),
            "differ in multimodal inputs or prompts",
        ),
    ],
    ids=["plan", "mode", "inputs"],
)
def test_ranks_that_were_told_different_things(
    engines: Callable[[int], Engines],
    checkpoint: Checkpoints,
    options: dict[str, Any],
    differ: str,
) -> None:
    """Both end, and both say so, before any weight is loaded."""
    given = prompts()
    model = checkpoint("llama")
    told = [Job(model, {0: given[0]}, shared()), Job(model, {1: given[1]}, options)]
    for outcome in engines(2).outcomes(run_rank, told, free_port()):
        assert outcome.error == "AgreementError", outcome
        assert differ in outcome.message

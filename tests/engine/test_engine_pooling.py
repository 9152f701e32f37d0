"""Models that end in a vector of each prompt: no lm_head, and the rest shared as elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
from engines import Job, merged, probe, shared
from random_checkpoints import Checkpoints, parts, prompts

SHARED = ("embedding", "oproj", "mlp")
SMALL = {"runner": "pooling", "max_num_seqs": 2, "max_num_batched_tokens": 32}


def _embed(llm: Any, job: Job) -> dict[str, Any]:
    numbers = sorted(job.prompts)
    given = [{"prompt_token_ids": list(job.prompts[i])} for i in numbers]
    outputs = llm.embed(given, use_tqdm=False)
    vectors = [output.outputs.embedding for output in outputs]
    (found,) = llm.apply_model(probe)
    return found | {"vectors": dict(zip(numbers, vectors, strict=True))}


@pytest.fixture(scope="module")
def whole(engines: Any, checkpoint: Checkpoints) -> dict[str, Any]:
    options = SMALL | {"enforce_eager": True}
    found: dict[str, Any] = engines(1)(Job(checkpoint("qwen3"), prompts(), options, run=_embed))[0]
    return found


@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_vectors(engines: Any, checkpoint: Checkpoints, whole: dict[str, Any], runner: str) -> None:
    """In several steps, so that a rank is done before the other."""
    given, options = prompts(), merged(SMALL, shared(*SHARED))
    got = engines(2, runner)(
        *[
            Job(checkpoint("qwen3"), {i: given[i] for i in part}, options, run=_embed)
            for part in parts(len(given), 2)
        ]
    )
    assert sorted(i for one in got for i in one["vectors"]) == sorted(given)
    for one in got:
        for i, vector in one["vectors"].items():
            assert vector == pytest.approx(whole["vectors"][i], abs=1e-5)
        assert {component for component, _, _ in one["sites"]} == set(SHARED)
        assert one["bytes"] == whole["bytes"] - one["saved"]

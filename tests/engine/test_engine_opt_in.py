"""Attention's projections and shared experts, which stay whole unless their keys are given."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import zoo
from engines import Answer, merged, shared
from marks import full
from random_checkpoints import CHECKPOINTS, Checkpoints
from safetensors import safe_open
from test_engine_tokens import assert_same

Run = Callable[..., list[Answer]]
One = Callable[..., Answer]
ABSORBED = "kv_b_proj"  # vLLM's attention takes it apart: it stays whole

SIX = (*zoo.COMPONENTS, *zoo.OPT_IN)


def _bytes_of(model: str, names: Iterable[str]) -> int:
    """Of these weights in the checkpoint."""
    with safe_open(Path(model) / "model.safetensors", "pt") as file:
        return sum(file.get_tensor(name).nbytes for name in names if ABSORBED not in name)


@pytest.mark.parametrize(
    ("name", "runner"),
    [
        ("qwen3", "v1"),
        ("qwen2_moe", "v1"),
        ("deepseek_v2", "v1"),
        ("glm4_moe", "v1"),
        pytest.param("qwen2", "v1", marks=full),
        pytest.param("deepseek_v3", "v1", marks=full),
        ("qwen3", "v2"),
        pytest.param("qwen2_moe", "v2", marks=full),
    ],
)
def test_tokens_and_memory(
    name: str,
    runner: str,
    checkpoint: Checkpoints,
    unsharded: One,
    sharded: Run,
) -> None:
    asked = CHECKPOINTS[name].opt_in
    got = sharded(name, shared(*asked), runner=runner)
    assert_same(unsharded(name), got)
    of_asked = sum(_bytes_of(checkpoint(name), CHECKPOINTS[name].weights(c)) for c in asked)
    whole = unsharded(name).found[0]["bytes"]
    for answer in got:
        (found,) = answer.found
        assert {site[0] for site in found["sites"]} == set(asked)
        assert whole - found["bytes"] == of_asked // 2


def test_compiled_around_experts(unsharded: One, sharded: Run, engines: Any) -> None:
    """Experts are one op of the graph, as on GPUs, and a shared one runs within it."""
    options = merged(shared(*SIX), {"enforce_eager": False})
    environment = {"FGTP_TEST_OPAQUE": "1", "VLLM_LOGGING_LEVEL": "DEBUG"}
    got = sharded("qwen2_moe", options, environment=environment)
    assert_same(unsharded("qwen2_moe"), got)
    _, graph = engines(2).log(0).split("the graph after the pass:", 1)
    graph = graph[: graph.index("return")]
    assert "moe_forward_shared" in graph
    assert "shared_expert" not in graph


def test_without_expert_parallelism(unsharded: One, sharded: Run) -> None:
    """Routed experts are then cut over all ranks, and their results are summed."""
    name = "qwen2_moe"
    got = sharded(name, merged(shared("sharedexpert"), {"enable_expert_parallel": False}))
    assert_same(unsharded(name), got)


@full
@pytest.mark.parametrize("name", ["qwen2_moe", "deepseek_v3"])
def test_beside_tensor_parallelism(unsharded: One, sharded: Run, name: str) -> None:
    """Shared experts then end in sums over the tensor-parallel ranks; latents are whole on each."""
    beside = {"tensor_parallel_size": 2, "enable_expert_parallel": False}
    got = sharded(name, merged(shared(*SIX), beside), processes="fork")
    assert_same(unsharded(name), got)
    assert all(len(answer.found) == 2 for answer in got)

"""Compiled and eager, one component and all, other sizes: always the tokens of one rank."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engines import Answer, merged, shared
from marks import full
from random_checkpoints import CHECKPOINTS, parts, prompts
from test_engine_tokens import assert_same

Run = Callable[..., list[Answer]]
One = Callable[..., Answer]


@full
def test_inductor(unsharded: One, sharded: Run) -> None:
    assert_same(
        unsharded("llama"),
        sharded("llama", shared(), environment={"VLLM_CPU_CI_ENV": None}),
    )


@full
@pytest.mark.parametrize("plain", [False, True], ids=["packed", "plain"])
def test_piecewise_cold_and_warm(
    unsharded: One, sharded: Run, engines: Any, tmp_path: Path, plain: bool
) -> None:
    """vLLM's own compiler backend behind the pass; the second start finds the first one's cache
    and plan. Plain weights are gathered in long steps, by a second graph.
    """
    environment = {
        "FGTP_TEST_PIECEWISE": "1",
        "VLLM_CPU_CI_ENV": None,
        "VLLM_CACHE_ROOT": str(tmp_path),
        "FGTP_CACHE_DIR": str(tmp_path),
        "VLLM_LOGGING_LEVEL": "DEBUG",
    } | ({"FGTP_TEST_PLAIN": "1"} if plain else {})
    logs = []
    for _ in range(2):
        got = sharded("llama", shared(), environment=environment)
        assert_same(unsharded("llama"), got)
        logs.append(engines(2).log(0))
    cold, warm = logs
    assert ("tokens and more gather weights" in cold) is plain
    assert "Dynamo bytecode transform time" in cold
    assert "Directly load AOT compilation" in warm
    assert "Dynamo bytecode transform time" not in warm
    assert ("the plan is that of" in cold, "the plan is that of" in warm) == (False, True)


def test_plain_weights_are_inputs_of_the_graph(unsharded: One, sharded: Run, engines: Any) -> None:
    """Where no kernel packs them: what vLLM's fusions see is a linear, not an op of ours."""
    environment = {"FGTP_TEST_PLAIN": "1", "VLLM_LOGGING_LEVEL": "DEBUG"}
    assert_same(unsharded("llama"), sharded("llama", shared(), environment=environment))
    _, graph = engines(2).log(0).split("the graph after the pass:", 1)
    graph = graph[: graph.index("return")]
    assert "fgtp" not in graph.replace("fgtp_data_", "")  # but for the group's name
    layers, shards = 2, ("self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    linears = [line for line in graph.splitlines() if "= linear(" in line]
    assert len(linears) == 4 * layers
    for shard in shards:
        assert sum(f"{shard}.weight" in line for line in linears) == layers
    # embedding; and in each layer o_proj's exchange, an all_reduce into the FFN, the FFN's sum
    assert graph.count("wait_tensor(") == 2 + 3 * layers


def test_a_long_prefill_gathers_plain_weights(unsharded: One, sharded: Run, engines: Any) -> None:
    """Steps with many tokens run a graph of their own; those with few, and idle ones, the other."""
    environment = {"FGTP_TEST_PLAIN": "1", "VLLM_LOGGING_LEVEL": "DEBUG"}
    options = merged(shared(), {"max_num_batched_tokens": 160, "enable_chunked_prefill": True})
    assert_same(unsharded("llama"), sharded("llama", options, environment=environment))
    log = engines(2).log(0)
    found = re.search(r"steps of (\d+) tokens and more gather weights", log)
    assert found
    given = prompts()
    most = max(sum(len(given[i]) for i in part) for part in parts(len(given), 2))
    assert int(found[1]) <= most <= 160, "one rank's prompts run in one step, and both are padded"
    few, many = (text[: text.index("return")] for text in log.split(" after the pass:")[1:3])
    moved = [text.count("::all_to_all_single(") for text in (few, many)]
    assert moved == [1 + 2 * 2, 1 + 2], "o_proj's tokens stay, the FFN's weights are still more"


def test_enforce_eager(unsharded: One, sharded: Run) -> None:
    assert_same(unsharded("llama"), sharded("llama", merged(shared(), {"enforce_eager": True})))


@full
@pytest.mark.parametrize("component", ["mlp", "lmhead"])  # within the graph, and after it
def test_one_component(unsharded: One, sharded: Run, component: str) -> None:
    got = sharded("llama", shared(component))
    assert_same(unsharded("llama"), got)
    for answer in got:
        assert {site[0] for site in answer.found[0]["sites"]} == {component}


def test_tight_batches(unsharded: One, sharded: Run) -> None:
    """More requests than fit, prompts in chunks, cached prefixes."""
    tight: dict[str, Any] = {
        "max_num_seqs": 2,
        "max_num_batched_tokens": 16,
        "enable_chunked_prefill": True,
        "enable_prefix_caching": True,
        "block_size": 32,
    }
    assert_same(unsharded("llama"), sharded("llama", merged(shared(), tight)))


@full
def test_four_ranks_with_mixed_sizes(unsharded: One, sharded: Run) -> None:
    options = shared(size=2)
    sizes = options["additional_config"]["finegrained_tp_config"]
    sizes["embedding_tensor_parallel_size"] = 4
    sizes["mlp_tensor_parallel_size"] = 4
    got = sharded("llama", options, world=4)
    assert_same(unsharded("llama"), got)
    sizes_found = {site[:2] for answer in got for site in answer.found[0]["sites"]}
    assert sizes_found == {("embedding", 4), ("mlp", 4), ("oproj", 2), ("lmhead", 2)}


@full
def test_beside_tensor_parallelism(unsharded: One, sharded: Run) -> None:
    name = "qwen3"  # tied, with norms of q and k
    every = (*CHECKPOINTS[name].components, *CHECKPOINTS[name].opt_in)
    options = merged(shared(*every), {"tensor_parallel_size": 2}, CHECKPOINTS[name].options)
    got = sharded(name, options, processes="fork")
    assert_same(unsharded(name), got)
    assert all(len(answer.found) == 2 for answer in got)

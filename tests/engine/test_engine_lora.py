"""Adapters beside sharded components: tokens are those of one rank with the same adapters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from adapters import ATTENTION, FFN, VOCABULARY, write_adapter
from engines import COMPONENTS, Answer, Job, answer_of, merged, probe, run_rank, sampling, shared
from marks import full
from random_checkpoints import Checkpoints, prompts
from ranks import free_port
from test_engine_tokens import assert_same

Run = Callable[..., list[Answer]]
One = Callable[..., Answer]

# one slot more than adapters: vLLM's CPU kernels take the last for tokens without one
ON = {"enable_lora": True, "max_loras": 4, "max_lora_rank": 8}
LATE = 3


def _with_adapters(paths: Sequence[str], llm: Any, job: Job) -> Answer:
    """Prompt i by adapter i % 4, of which 0 is none. The last adapter comes while others are
    served, and its prompts after it.
    """
    from vllm.lora.request import LoRARequest

    engine, finished = llm.llm_engine, {}
    by_prompt = [None, *(LoRARequest(f"a{n}", n, path) for n, path in enumerate(paths, 1))]

    def ask(i: int) -> None:
        prompt = {"prompt_token_ids": list(job.prompts[i])}
        engine.add_request(str(i), prompt, sampling(i), lora_request=by_prompt[i % 4])

    late = [i for i in job.prompts if i % 4 == LATE]
    for i in job.prompts.keys() - late:
        ask(i)
    for step in range(1000):
        if step == 4:
            assert engine.add_lora(by_prompt[LATE])
            for i in late:
                ask(i)
        if step > 4 and not engine.has_unfinished_requests():
            break
        for output in engine.step():
            if output.finished:
                finished[int(output.request_id)] = output
    workers = zip(llm.apply_model(probe), llm.collective_rpc("list_loras"), strict=True)
    return answer_of(finished, [found | {"adapters": loaded} for found, loaded in workers])


def _write(folder: Path, model: str, *modules: Sequence[str]) -> list[str]:
    return [
        write_adapter(folder / str(n), model, n, (8, 4)[n % 2], one)
        for n, one in enumerate(modules, 1)
    ]


@pytest.fixture(scope="module")
def every(tmp_path_factory: Any, checkpoint: Checkpoints) -> Callable[..., Answer]:
    """The run with adapters for all that llama has, and for some of it."""
    everything = (*ATTENTION, *FFN, *VOCABULARY)
    paths = _write(
        tmp_path_factory.mktemp("adapters"),
        checkpoint("llama"),
        everything,
        ("q_proj", "down_proj", "lm_head"),
        everything,
    )
    return partial(_with_adapters, paths)


def test_adapters_change_tokens(unsharded: One, every: Any) -> None:
    """So that what follows would see one that is left out."""
    without, given = unsharded("llama"), unsharded("llama", {"run": every}, **ON)
    for i, tokens in given.tokens.items():
        assert (tokens == without.tokens[i]) == (i % 4 == 0)


@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_other_adapters_on_each_rank(
    engines: Any, unsharded: One, sharded: Run, every: Any, runner: str
) -> None:
    """The second rank has fewer requests, and idles; it keeps what it has loaded."""
    got = sharded("llama", merged(shared(), ON), run=every, runner=runner)
    want = unsharded("llama", {"run": every}, **ON)
    assert_same(want, got)
    assert [answer.found[0]["adapters"] for answer in got] == [{1, 2, 3}, {1, 3}]
    whole = want.found[0]["bytes"]
    for answer in got:
        (found,) = answer.found
        assert found["bytes"] == whole - found["saved"] < whole
    assert "adapters may add to inner features of 2 FFNs" in engines(2, runner).log(0)


def test_of_attention_alone(
    engines: Any, checkpoint: Checkpoints, unsharded: One, sharded: Run, tmp_path: Path
) -> None:
    """FFNs are then one stretch as before. Projections are sharded too, and tables are tied."""
    paths = _write(tmp_path, checkpoint("qwen3"), *[ATTENTION] * 3)
    run, on = partial(_with_adapters, paths), ON | {"lora_target_modules": list(ATTENTION)}
    got = sharded("qwen3", merged(shared(*COMPONENTS, "qkv"), on), run=run)
    assert_same(unsharded("qwen3", {"run": run}, **on), got)
    assert "inner features" not in engines(2).log(0)


@pytest.mark.parametrize("inductor", [False, pytest.param(True, marks=full)])
def test_in_a_graph(
    engines: Any, unsharded: One, sharded: Run, every: Any, tmp_path: Path, inductor: bool
) -> None:
    """With kernels that add to the result of a projection in place, and plain weights, as there are
    on GPUs.
    """
    environment: dict[str, str | None] = {"FGTP_TEST_ADAPTERS": "1", "FGTP_TEST_PLAIN": "1"}
    environment |= {"VLLM_LOGGING_LEVEL": "DEBUG"}
    if inductor:
        # a graph that an earlier run has kept would not be written again
        environment |= {"VLLM_CPU_CI_ENV": None, "VLLM_CACHE_ROOT": str(tmp_path)}
    got = sharded("llama", merged(shared(), ON), run=every, environment=environment)
    assert_same(unsharded("llama", {"run": every}, **ON), got)
    _, graph = engines(2).log(0).split("the graph after the pass:", 1)
    graph = graph[: graph.index("return")]
    layers, wrapped = 2, 4
    assert graph.count("add_pairs") == layers * wrapped
    assert "all_to_all" in graph


@full
def test_beside_tensor_parallelism(unsharded: One, sharded: Run, every: Any) -> None:
    options = merged(shared(*COMPONENTS, "qkv"), ON, {"tensor_parallel_size": 2})
    got = sharded("llama", options, run=every, processes="fork")
    assert_same(unsharded("llama", {"run": every}, **ON), got)
    assert all(len(answer.found) == 2 for answer in got)


@full
def test_all_ranks_from_one_process(
    engines: Any, checkpoint: Checkpoints, unsharded: One, every: Any
) -> None:
    """An adapter that is loaded while serving is then on every rank."""
    options = merged(shared(), ON, {"data_parallel_size": 2})
    job = Job(checkpoint("llama"), prompts(), options, run=every, processes="fork")
    (got,) = engines(1)(job)
    assert_same(unsharded("llama", {"run": every}, **ON), [got])
    assert all(LATE in found["adapters"] for found in got.found)


def test_ranks_with_other_target_modules(engines: Any, checkpoint: Checkpoints) -> None:
    """An FFN of one would run in a stretch, and that of the other would not."""
    given, model = prompts(), checkpoint("llama")
    options = merged(shared(), ON)
    some = {"lora_target_modules": ["o_proj"]}
    told = [Job(model, {0: given[0]}, options), Job(model, {1: given[1]}, merged(options, some))]
    for outcome in engines(2).outcomes(run_rank, told, free_port()):
        assert outcome.error == "AgreementError", outcome
        assert "differ in lora_target_modules" in outcome.message

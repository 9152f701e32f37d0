"""What requests ask for beyond tokens: constrained output; and drafts that ngrams guess."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from engines import (
    TWO_STAGES,
    WARMED_UP,
    Answer,
    Job,
    answer_of,
    merged,
    probe,
    run_rank,
    sampling,
    shared,
)
from marks import full
from random_checkpoints import Checkpoints, parts, prompts, write_tokenizer
from ranks import free_port
from test_engine_tokens import TIE, assert_same

One = Callable[..., Answer]
DIGITS = "([3-7]){5}"
# more for `on_two_ranks`
ONE: dict[str, Any] = {}
STAGES = {"options": TWO_STAGES, "environment": WARMED_UP, "processes": "fork"}


def _every_other_constrained(llm: Any, job: Job) -> Answer:
    from vllm.sampling_params import StructuredOutputsParams

    numbers = sorted(job.prompts)
    digits = StructuredOutputsParams(regex=DIGITS)
    outputs = llm.generate(
        [{"prompt_token_ids": list(job.prompts[i])} for i in numbers],
        [sampling(i, **({"structured_outputs": digits} if i % 2 else {})) for i in numbers],
        use_tqdm=False,
    )
    return answer_of(dict(zip(numbers, outputs, strict=True)), llm.apply_model(probe))


def on_two_ranks(engines: Any, model: str, given: Mapping[int, Any], **more: Any) -> list[Answer]:
    options, runner = merged(shared(), more.pop("options", {})), more.pop("runner", "v1")
    answers: list[Answer] = engines(2, runner)(
        *[Job(model, {i: given[i] for i in part}, options, **more) for part in parts(len(given), 2)]
    )
    return answers


def test_structured_output(engines: Any, checkpoint: Checkpoints, unsharded: One) -> None:
    model, options = checkpoint("llama"), {"skip_tokenizer_init": False}
    write_tokenizer(Path(model))
    run = {"run": _every_other_constrained}
    want = unsharded("llama", run, **options)
    got = on_two_ranks(engines, model, prompts(), options=options, **run)
    assert_same(want, got)
    for i, tokens in want.tokens.items():
        digits = "".join(map(str, tokens))[:5]  # tokens are numbers of one digit or more
        assert (re.fullmatch(DIGITS, digits) is not None) == (i % 2 == 1)


def _one_waits_for_its_grammar(llm: Any, job: Job) -> Answer:
    """Rank 1 has one request, whose grammar takes long: it has nothing to run meanwhile."""
    from vllm.v1.structured_output import StructuredOutputManager

    stock = StructuredOutputManager._create_grammar

    def slow(manager: Any, request: Any) -> Any:
        time.sleep(1.0)
        return stock(manager, request)

    with mock.patch.object(StructuredOutputManager, "_create_grammar", slow):
        return _every_other_constrained(llm, job)


def test_a_rank_that_waits_for_a_grammar(
    engines: Any, checkpoint: Checkpoints, unsharded: One
) -> None:
    model, given = checkpoint("llama"), prompts()
    write_tokenizer(Path(model))
    options = merged(shared(fgtp_options={"timeout_seconds": 60}), {"skip_tokenizer_init": False})
    of_rank = {_every_other_constrained: (0, 2, 4, 6), _one_waits_for_its_grammar: (5,)}
    got = engines(2)(
        *[
            Job(model, {i: given[i] for i in numbers}, options, run=run)
            for run, numbers in of_rank.items()
        ]
    )
    run = {"run": _every_other_constrained, "prompts": {i: given[i] for i in (0, 2, 4, 5, 6)}}
    assert_same(unsharded("llama", run, skip_tokenizer_init=False), got)


def _some_with_prompts(llm: Any, job: Job) -> Answer:
    """Logprobs of their prompts for requests 1, 3 and 6; two of them are on one rank."""
    numbers = sorted(job.prompts)
    asked = {1: 2, 3: 0, 6: 3}
    outputs = llm.generate(
        [{"prompt_token_ids": list(job.prompts[i])} for i in numbers],
        [sampling(i, **({"prompt_logprobs": asked[i]} if i in asked else {})) for i in numbers],
        use_tqdm=False,
    )
    return answer_of(dict(zip(numbers, outputs, strict=True)), llm.apply_model(probe))


@pytest.mark.parametrize(
    "stages", [pytest.param(ONE, id="one"), pytest.param(STAGES, id="two", marks=full)]
)
def test_logits_of_prompts(
    engines: Any, checkpoint: Checkpoints, unsharded: One, stages: dict[str, Any]
) -> None:
    """Prompts in chunks, on ranks that have other numbers of them, beside idle ranks."""
    tight = {"max_num_batched_tokens": 16, "max_num_seqs": 4, "enable_prefix_caching": False}
    run = {"run": _some_with_prompts}
    want = unsharded("llama", run)
    more = stages | run | {"options": merged(stages.get("options", {}), tight)}
    got = on_two_ranks(engines, checkpoint("llama"), prompts(), **more)
    assert_same(want, got)
    for answer in got:
        for i, found in answer.prompts.items():
            for before, after in zip(want.prompts[i], found, strict=True):
                assert after == pytest.approx(before, abs=TIE)
    assert sorted(want.prompts) == sorted(i for answer in got for i in answer.prompts) == [1, 3, 6]


def test_ngram_speculation(engines: Any, checkpoint: Checkpoints, unsharded: One) -> None:
    """Steps of one rank verify more tokens than those of the other; the tokens stay."""
    repeating = {i: (ids[:6] * 4)[: 10 + i] for i, ids in prompts(8).items()}
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
    options = {"speculative_config": drafts}
    got = on_two_ranks(engines, checkpoint("llama"), repeating, options=options)
    assert_same(unsharded("llama", {"prompts": repeating}), got)
    assert "SpeculativeConfig(method='ngram'" in engines(2).log(0)


def _some_as_embeddings(llm: Any, job: Job) -> Answer:
    """Every third prompt as embeddings; a batch of these alone looks nothing up."""
    import torch

    def prompt(i: int) -> Any:
        if i % 3:
            return {"prompt_token_ids": list(job.prompts[i])}
        source = torch.Generator().manual_seed(i)
        return {"prompt_embeds": 0.1 * torch.randn(len(job.prompts[i]), 128, generator=source)}

    numbers = sorted(job.prompts)
    outputs = llm.generate(
        [prompt(i) for i in numbers], [sampling(i) for i in numbers], use_tqdm=False
    )
    return answer_of(dict(zip(numbers, outputs, strict=True)), llm.apply_model(probe))


def _reads_twice(llm: Any, job: Job) -> Answer:
    def again(model: Any) -> None:
        stock = model.embed_input_ids
        model.embed_input_ids = lambda input_ids: (stock(input_ids[:1]), stock(input_ids))[1]

    llm.apply_model(again)
    return _some_as_embeddings(llm, job)


def test_a_table_that_is_read_once_more_than_was_said(
    engines: Any, checkpoint: Checkpoints
) -> None:
    """As an encoder might; others, who do not know of it, would wait without end."""
    options, model = merged(shared(), {"enable_prompt_embeds": True}), checkpoint("llama")
    jobs = [Job(model, {i: prompts()[i]}, options, run=_reads_twice) for i in (1, 2)]
    for outcome in engines(2).outcomes(run_rank, jobs, free_port()):
        assert outcome.error == "AgreementError", outcome
        assert "model.embed_tokens.weight is read outside the graph a second" in outcome.message


@pytest.mark.parametrize(
    ("runner", "stages"),
    [
        pytest.param("v1", ONE, id="v1"),
        pytest.param("v2", ONE, id="v2"),
        pytest.param("v1", STAGES, id="v1_two_stages", marks=full),
    ],
)
def test_prompts_as_embeddings(
    engines: Any, checkpoint: Checkpoints, unsharded: One, runner: str, stages: dict[str, Any]
) -> None:
    """The table is read outside the graph, at another count of tokens on each rank."""
    options, run = {"enable_prompt_embeds": True}, {"run": _some_as_embeddings}
    want = unsharded("llama", run, **options)
    more = stages | run | {"options": merged(stages.get("options", {}), options)}
    got = on_two_ranks(engines, checkpoint("llama"), prompts(), runner=runner, **more)
    assert_same(want, got)

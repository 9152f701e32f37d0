"""What requests ask for beyond tokens: constrained output; and drafts that ngrams guess."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from checkpoints import Checkpoints, parts, prompts, write_tokenizer
from engines import Answer, Job, answer_of, merged, probe, sampling, shared
from test_engine_tokens import assert_same

One = Callable[..., Answer]
DIGITS = "([3-7]){5}"


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
    options = merged(shared(), more.pop("options", {}))
    answers: list[Answer] = engines(2)(
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


def test_ngram_speculation(engines: Any, checkpoint: Checkpoints, unsharded: One) -> None:
    """Steps of one rank verify more tokens than those of the other; the tokens stay."""
    repeating = {i: (ids[:6] * 4)[: 10 + i] for i, ids in prompts(8).items()}
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
    options = {"speculative_config": drafts}
    got = on_two_ranks(engines, checkpoint("llama"), repeating, options=options)
    assert_same(unsharded("llama", {"prompts": repeating}), got)
    assert "SpeculativeConfig(method='ngram'" in engines(2).log(0)

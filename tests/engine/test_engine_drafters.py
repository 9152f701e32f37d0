"""Drafters beside sharded components: tokens are those of the target alone, in both runners."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from drafters import write_eagle, write_eagle3, write_mtp
from engines import Answer, Job, answer_of, merged, probe, sampling, shared
from marks import full
from random_checkpoints import CHECKPOINTS, Checkpoints, parts, prompts, write_tokenizer
from test_engine_requests import DIGITS
from test_engine_tokens import assert_same

One = Callable[..., Answer]
LONGEST = 64  # tokens of a request, max_model_len


def _everything(llm: Any, job: Job, constrained: int | None = None) -> Answer:
    """Requests that end at max_model_len beside short ones and one of digits only, and that are
    given up. The last of a rank come when the other has none left.
    """
    from vllm.sampling_params import StructuredOutputsParams

    engine, finished = llm.llm_engine, {}
    for i, ids in job.prompts.items():
        more: dict[str, Any] = {}
        if i == 0:
            more = {"max_tokens": LONGEST - len(ids)}
        if i == constrained:
            more = {"structured_outputs": StructuredOutputsParams(regex=DIGITS)}
        engine.add_request(str(i), {"prompt_token_ids": list(ids)}, sampling(i, **more))
        if i % 3 == 0:
            more = {"max_tokens": 60, "prompt_logprobs": 1}
            engine.add_request(f"{i} up", {"prompt_token_ids": list(ids)}, sampling(i, **more))
    for step in range(1000):
        if not engine.has_unfinished_requests():
            break
        for output in engine.step():
            if output.finished and output.request_id.isdigit():
                finished[int(output.request_id)] = output
        if step == 4:
            engine.abort_request([f"{i} up" for i in job.prompts])
    (found,) = llm.apply_model(probe)
    counters = {
        metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")
    }
    drafted, accepted = (
        counters.get(f"vllm:spec_decode_num_{what}_tokens", 0) for what in ("draft", "accepted")
    )
    return answer_of(finished, [found | {"accepted": accepted / drafted if drafted else 0}])


def _drafter(kind: str, target: str, folder: Path) -> tuple[str, dict[str, Any]]:
    """The model to serve, and its `speculative_config`; two drafts a step."""
    given: dict[str, Any] = {"num_speculative_tokens": 2}
    if kind == "mtp":
        like_target = {"attention_backend": CHECKPOINTS["deepseek_v3"].options["attention_backend"]}
        return write_mtp(target, folder), given | {"method": "mtp"} | like_target
    if kind == "every draft is right":
        return target, given | {"method": "draft_model", "model": target}
    write = {"eagle": write_eagle, "eagle3": write_eagle3}[kind]
    return target, given | {"method": kind, "model": write(target, folder)}


ONCE = [("eagle", "llama", "v1"), ("every draft is right", "llama", "v2")]
OTHERS = [
    ("eagle3", "llama", "v1"),
    ("every draft is right", "llama", "v1"),
    ("mtp", "deepseek_v3", "v1"),
    ("eagle", "llama", "v2"),
    ("eagle3", "llama", "v2"),
]


@pytest.mark.parametrize(
    ("kind", "name", "runner"), [*ONCE, *(pytest.param(*other, marks=full) for other in OTHERS)]
)
def test_tokens_are_those_of_the_target(
    engines: Any,
    checkpoint: Checkpoints,
    unsharded: One,
    tmp_path: Path,
    kind: str,
    name: str,
    runner: str,
) -> None:
    target, given = checkpoint(name), prompts()
    write_tokenizer(Path(target))
    more = {"skip_tokenizer_init": False, "disable_log_stats": False, "max_model_len": LONGEST}
    # Triton's interpreter does not run V2's kernel for grammars
    run = functools.partial(_everything, constrained=4 if runner == "v1" else None)
    alone = unsharded(name, {"run": run}, **more)
    model, speculative = _drafter(kind, target, tmp_path / "drafter")
    options = merged(
        shared(*CHECKPOINTS[name].components, *CHECKPOINTS[name].opt_in),
        CHECKPOINTS[name].options,
        {"speculative_config": speculative} | more,
    )
    jobs = [
        Job(model, {i: given[i] for i in part}, options, run=run) for part in parts(len(given), 2)
    ]
    got = engines(2, runner)(*jobs)
    assert_same(alone, got)
    for answer in got:
        accepted = answer.found[0]["accepted"]
        assert accepted > 0.5 if kind == "every draft is right" else accepted < 0.5

"""`vllm serve` with two ranks and its default two API servers, over HTTP: clients at once, streams,
logprobs of prompts, one that leaves.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from engines import Answer, shared, tokens_of
from fork_server import ForkServer
from openai import OpenAI
from random_checkpoints import Checkpoints, prompts
from servers import serving
from test_engine_tokens import TIE

CLIENTS = 12
ASKING = (2, 3, 5, 7, 8)  # for logprobs of their prompts; by chance both API servers get some


def test_clients_at_once(
    checkpoint: Checkpoints,
    unsharded: Callable[..., Answer],
    server: Callable[..., ForkServer],
    tmp_path: Path,
) -> None:
    model, given = checkpoint("llama"), prompts(CLIENTS)
    sizes = json.dumps(shared()["additional_config"])
    arguments = ("--data-parallel-size", "2", "-cc.passes=fgtp", "--additional-config", sizes)
    with serving(server(), tmp_path / "served", model, *arguments) as served:

        def ask(i: int, **more: Any) -> Any:
            client = OpenAI(base_url=served.url, api_key="none", timeout=120, max_retries=0)
            extra = {"return_token_ids": True, "ignore_eos": True} | more.pop("extra", {})
            request = {"max_tokens": tokens_of(i), "temperature": 0} | more
            return client.completions.create(
                model=model, prompt=given[i], extra_body=extra, **request
            )

        def whole(i: int) -> list[int]:
            if i % 2:
                return list(ask(i).choices[0].token_ids)
            parts = [part.choices[0].token_ids for part in ask(i, stream=True) if part.choices]
            assert len(parts) > 1
            return [token for part in parts for token in part]

        def leaves(i: int) -> None:
            with ask(i, stream=True, max_tokens=80) as stream:
                next(iter(stream))

        def of_its_prompt(i: int) -> list[dict[int, float]]:
            choice = ask(i, extra={"prompt_logprobs": 1}).choices[0]
            return [
                {int(token): said["logprob"] for token, said in (at or {}).items()}
                for at in choice.prompt_logprobs
            ]

        with ThreadPoolExecutor(CLIENTS + 2 + len(ASKING)) as pool:
            beside = [pool.submit(leaves, i) for i in (0, 1)]
            answers = {i: pool.submit(whole, i) for i in given}
            asked = {i: pool.submit(of_its_prompt, i) for i in ASKING}
            for other in beside:
                other.result()
            got = {i: answer.result() for i, answer in answers.items()}
            of_prompts = {i: found.result() for i, found in asked.items()}
        late = whole(0)  # the other rank idles
        log = served.log.read_text()
    want = unsharded("llama", {"prompts": given, "sampling": {"prompt_logprobs": 1}})
    assert got == want.tokens
    assert late == got[0]
    for i, found in of_prompts.items():
        for before, after in zip(want.prompts[i], found, strict=True):
            assert after == pytest.approx(before, abs=TIE)
    assert "ApiServer_1" in log
    assert "fgtp: ranks 0 to 1 share" in log

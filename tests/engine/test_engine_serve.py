"""`vllm serve` with two ranks, over HTTP: clients at once, streams, a refusal, one that leaves."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from checkpoints import Checkpoints, prompts
from demo_vllm import serving
from engines import Answer, shared, tokens_of
from openai import BadRequestError, OpenAI

CLIENTS = 12


def test_clients_at_once(
    checkpoint: Checkpoints, unsharded: Callable[..., Answer], tmp_path: Path
) -> None:
    model, given = checkpoint("llama"), prompts(CLIENTS)
    sizes = json.dumps(shared()["additional_config"])
    arguments = ("-cc.passes=fgtp", "--additional-config", sizes)
    with serving(Path(model), tmp_path / "log", *arguments) as port:
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=120)

        def ask(i: int, **more: Any) -> Any:
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

        def refused(i: int) -> None:
            with pytest.raises(BadRequestError, match="prompt_logprobs is not supported"):
                ask(i, extra={"prompt_logprobs": 1})

        with ThreadPoolExecutor(CLIENTS + 4) as pool:
            beside = [pool.submit(leaves, i) for i in (0, 1)]
            answers = {i: pool.submit(whole, i) for i in given}
            beside += [pool.submit(refused, i) for i in (2, 3)]
            for other in beside:
                other.result()
            got = {i: answer.result() for i, answer in answers.items()}
        late = whole(0)  # the other rank idles
    assert got == unsharded("llama", {"prompts": given}).tokens
    assert late == got[0]
    assert "fgtp: ranks 0 to 1 share" in (tmp_path / "log").read_text()

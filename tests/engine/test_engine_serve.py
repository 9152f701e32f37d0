"""`vllm serve` with two ranks and its default two API servers, over HTTP: clients at once, streams,
logprobs of prompts, one that leaves; and how it ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from engines import Answer, shared, tokens_of
from faults import Fault, is_over
from fork_server import Fork, ForkServer, session
from marks import full
from openai import APIError, OpenAI
from random_checkpoints import Checkpoints, prompts
from ranks import HANG
from servers import serving
from test_engine_tokens import TIE

CLIENTS, STREAMS = 12, 6
PATIENCE = 60.0  # seconds that a server may take to end
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


def shared_memory(processes: list[Fork]) -> set[Path]:
    """The files in /dev/shm that they hold."""
    maps = [psutil.Process(process.pid).memory_maps() for process in processes]
    held = {Path(one.path) for every in maps for one in every if one.path.startswith("/dev/shm/")}
    return {file for file in held if file.exists()}


@pytest.mark.parametrize(
    ("number", "when"),
    [
        (signal.SIGTERM, "at rest"),
        (signal.SIGTERM, "with requests"),
        (signal.SIGTERM, "as ranks meet"),
        pytest.param(signal.SIGINT, "with requests", marks=full),
        pytest.param(signal.SIGINT, "as ranks meet", marks=full),
    ],
)
def test_a_signal_ends_every_process(
    checkpoint: Checkpoints,
    server: Callable[..., ForkServer],
    tmp_path: Path,
    number: signal.Signals,
    when: str,
) -> None:
    """And leaves nothing in /dev/shm."""
    model, given = checkpoint("llama"), prompts(STREAMS)
    sizes = json.dumps(shared()["additional_config"])
    arguments = ("--data-parallel-size", "2", "-cc.passes=fgtp", "--additional-config", sizes)
    fault = tmp_path / "fault"
    starting, busy = when == "as ranks meet", when == "with requests"
    if starting:
        Fault("late", "start").ask(fault)
    with serving(
        server(),
        tmp_path / "served",
        model,
        *arguments,
        environment={"FGTP_TEST_FAULT": str(fault)},
        answers=not starting,
    ) as served:

        def ask(i: int) -> None:
            """Streams, one behind the other, until the server is gone."""
            client = OpenAI(base_url=served.url, api_key="none", timeout=120, max_retries=0)
            with contextlib.suppress(APIError, httpx.HTTPError):
                while True:
                    for _ in client.completions.create(
                        model=model, prompt=given[i], max_tokens=80, stream=True,
                        extra_body={"ignore_eos": True},
                    ):  # fmt: skip
                        started.release()

        started = threading.Semaphore(0)
        with ThreadPoolExecutor(STREAMS) as pool:
            answers = [pool.submit(ask, i) for i in (given if busy else ())]
            for _ in range(2 * len(answers)):
                assert started.acquire(timeout=HANG)
            while starting and not is_over(fault):
                time.sleep(0.1)
            running = [Fork(p.pid) for p in session(served.process.pid)]
            assert len(running) > 7  # and 2 API servers, the coordinator, 2 engines, 2 workers
            held = shared_memory(running)
            assert held
            os.kill(served.process.pid, number)
            begun = time.monotonic()
            served.wait_until_over(PATIENCE)
            for process in running:
                process.join(PATIENCE + begun - time.monotonic())
            left = [process for process in running if process.is_alive()]
        assert not left, served.log.read_text()[-8000:]
        assert not [file for file in held if file.exists()]
        for answer in answers:
            answer.result()

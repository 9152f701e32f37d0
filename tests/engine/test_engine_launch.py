"""Ways to launch the ranks of one model: a `vllm serve` for each, for some of them, or for those of
a host. All requests come at once, then some to each server alone, while the others are at rest.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from engines import Answer, Job, merged, shared, tokens_of
from fork_server import ForkServer
from marks import full
from openai import OpenAI
from random_checkpoints import Checkpoints, prompts
from ranks import HANG, free_port
from servers import Served, serving
from test_engine_tokens import TIE, assert_same
from two_hosts import two_hosts

MANY = 12
ASKING = (1, 4, 6)  # for logprobs of their prompts, too


def _arguments(ranks: int, *more: str, address: str = "127.0.0.1") -> tuple[str, ...]:
    """Of every server that has some of the ranks, which share all components."""
    sizes = json.dumps(shared(size=ranks)["additional_config"])
    return (
        *("-cc.passes=fgtp", "--additional-config", sizes, "--data-parallel-size", str(ranks)),
        *("--data-parallel-address", address, "--data-parallel-rpc-port", str(free_port()), *more),
    )


def _ask(served: Served, model: str, ids: Sequence[int], i: int) -> Any:
    client = OpenAI(base_url=served.url, api_key="none", timeout=HANG, max_retries=0)
    extra: dict[str, Any] = {"return_token_ids": True, "ignore_eos": True}
    if i in ASKING:
        extra |= {"prompt_logprobs": 1}
    given = {"max_tokens": tokens_of(i), "temperature": 0, "extra_body": extra}
    return client.completions.create(model=model, prompt=list(ids), **given).choices[0]  # type: ignore[call-overload]


def _assert_right(servers: Sequence[Served], model: str, want: Answer) -> None:
    given = prompts(MANY)

    def check(served: Served, i: int) -> None:
        choice = _ask(served, model, given[i], i)
        assert list(choice.token_ids) == want.tokens[i]
        if i in ASKING:
            for before, after in zip(want.prompts[i], choice.prompt_logprobs, strict=True):
                said = {int(token): one["logprob"] for token, one in (after or {}).items()}
                assert said == pytest.approx(before, abs=TIE)

    with ThreadPoolExecutor(MANY) as pool:
        for one in [pool.submit(check, servers[i % len(servers)], i) for i in given]:
            one.result()
    for number, served in enumerate(reversed(servers)):
        check(served, number)
        check(served, ASKING[0])


@pytest.fixture
def want(unsharded: Callable[..., Answer]) -> Answer:
    return unsharded("llama", {"prompts": prompts(MANY), "sampling": {"prompt_logprobs": 1}})


def _serve_all(
    stack: ExitStack,
    server: ForkServer,
    folder: Path,
    model: str,
    launches: Mapping[str, Sequence[str]],
) -> list[Served]:
    """Servers that come up together."""
    started = [
        stack.enter_context(serving(server, folder / name, model, *arguments, answers=False))
        for name, arguments in launches.items()
    ]
    for served in started:
        served.wait_until_up()
    return started


EXTERNAL = {f"rank {rank}": ("--data-parallel-rank", str(rank)) for rank in (0, 1)}
HYBRID = {
    f"ranks from {first}": (
        *("--data-parallel-hybrid-lb", "--data-parallel-size-local", "2"),
        *("--data-parallel-start-rank", str(first)),
    )
    for first in (0, 2)
}


@full
@pytest.mark.parametrize(
    ("ranks", "launches"), [(2, EXTERNAL), (4, HYBRID)], ids=["external", "hybrid"]
)
def test_a_server_for_some_of_the_ranks(
    checkpoint: Checkpoints,
    server: Callable[..., ForkServer],
    want: Answer,
    tmp_path: Path,
    ranks: int,
    launches: dict[str, tuple[str, ...]],
) -> None:
    """External load balancing has a server for each rank, hybrid one for those of a host."""
    model, every = checkpoint("llama"), _arguments(ranks)
    with ExitStack() as stack:
        given = {name: (*every, *own) for name, own in launches.items()}
        servers = _serve_all(stack, server(), tmp_path, model, given)
        _assert_right(servers, model, want)
        log = servers[0].log.read_text()
    assert f"fgtp: ranks 0 to {ranks - 1} share embedding over {ranks}" in log


@full
def test_a_host_without_a_server(
    checkpoint: Checkpoints, server: Callable[..., ForkServer], want: Answer, tmp_path: Path
) -> None:
    """Two hosts of one rank each; the second is headless."""
    model = checkpoint("llama")
    with two_hosts(tmp_path) as hosts:
        first, second = hosts.hosts
        every = _arguments(2, "--data-parallel-size-local", "1", address=first.address)
        launches = {
            first: ("--api-server-count", "2"),
            second: ("--headless", "--data-parallel-start-rank", "1"),
        }

        def body() -> str:
            with ExitStack() as stack:
                served, headless = (
                    stack.enter_context(
                        serving(
                            server(),
                            tmp_path / host.name,
                            model,
                            *every,
                            *own,
                            host=host,
                            environment={
                                "VLLM_HOST_IP": host.address,
                                "GLOO_SOCKET_IFNAME": host.interface,
                            },
                            answers=False,
                        )
                    )
                    for host, own in launches.items()
                )
                served.wait_until_up()
                _assert_right([served], model, want)
                return served.log.read_text() + headless.log.read_text()

        with ThreadPoolExecutor(1, initializer=first.enter) as pool:
            log = pool.submit(body).result()
    assert "fgtp: ranks 0 to 1 share embedding over 2" in log
    assert "in headless mode" in log


BLOCK = 32  # tokens of a block of KV cache; the smallest that the attention of CPUs takes


def _longer_than_a_block() -> dict[int, list[int]]:
    source = random.Random(2)
    return {
        i: [source.randrange(1, 500) for _ in range(source.randrange(BLOCK + 4, 2 * BLOCK))]
        for i in range(7)
    }


@full
def test_prefill_and_decode_apart(
    engines: Any, checkpoint: Checkpoints, unsharded: Callable[..., Answer], tmp_path: Path
) -> None:
    """Two instances of two ranks, with sizes of their own: the second takes the KV cache of all
    prompts from the first, whichever rank computed it.
    """
    model, given = checkpoint("llama"), _longer_than_a_block()

    def instance(
        role: str, sizes: dict[str, Any], first: Sequence[int], **more: Any
    ) -> list[Answer]:
        storage = {"shared_storage_path": str(tmp_path)}
        connector = {"kv_connector": "ExampleConnector", "kv_role": role}
        transfer = connector | {"kv_connector_extra_config": storage}
        options = merged(sizes, {"kv_transfer_config": transfer, "block_size": BLOCK})
        parts = (first, [i for i in given if i not in first])
        answers: list[Answer] = engines(2)(
            *[Job(model, {i: given[i] for i in part}, options, **more) for part in parts]
        )
        return answers

    instance("kv_producer", shared("mlp"), (0, 1, 2), sampling={"max_tokens": 1, "logprobs": None})
    got = instance("kv_consumer", shared(), (2, 3, 4, 5, 6))
    hits = sum(engines(2).log(rank).count("External Cache Hit!") for rank in (0, 1))
    assert hits == len(given)
    assert_same(unsharded("llama", {"prompts": given}), got)

"""Real clients of `vllm serve`, which reads a YAML file: two ranks behind four API servers answer
them all at once as one unsharded rank does.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from clients import CLIENTS
from engines import Engines, shared
from fork_server import ForkServer
from openai import OpenAI
from random_checkpoints import Checkpoints, write_text_tokenizer
from ranks import HANG
from servers import Served, serving
from test_engine_tokens import TIE

ROUNDS = 3  # of all clients, which come at once
REQUESTS, AT_ONCE = 200, 16  # of `vllm bench serve`
_ARGUMENTS = (
    *("--no-skip-tokenizer-init", "--max-num-seqs", "16"),
    *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
)
# a random model would put spaces without end between two keys
_JSON = {"backend": "xgrammar", "disable_any_whitespace": True}


@dataclass(frozen=True)
class Servers:
    """The same model twice: sharded on two ranks, and on one."""

    model: str
    sharded: Served
    whole: Served


@pytest.fixture(scope="module")
def servers(
    checkpoint: Checkpoints,
    server: Callable[..., ForkServer],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Servers]:
    folder = tmp_path_factory.mktemp("clients")
    model = str(shutil.copytree(checkpoint("llama"), folder / "model"))
    write_text_tokenizer(Path(model))
    file = folder / "serve.yaml"
    two_ranks = {"data-parallel-size": 2, "api-server-count": 4}
    options = {name.replace("_", "-"): value for name, value in shared().items()}
    file.write_text(yaml.safe_dump(two_ranks | options))
    given = (*_ARGUMENTS, "--structured-outputs-config", json.dumps(_JSON))
    with ExitStack() as stack:
        sharded, whole = (
            stack.enter_context(
                serving(server(), folder / name, model, *given, *more, answers=False)
            )
            for name, more in {"sharded": ("--config", str(file)), "whole": ()}.items()
        )
        for one in (sharded, whole):
            one.wait_until_up()
        yield Servers(model, sharded, whole)


@pytest.fixture(scope="module")
def answers(servers: Servers) -> dict[str, tuple[Future[Any], list[Future[Any]]]]:
    """By client, what the whole model answered, and what the sharded one did in every round."""

    def ask(name: str, served: Served) -> Any:
        client = OpenAI(base_url=served.url, api_key="none", timeout=HANG, max_retries=0)
        return CLIENTS[name](client, servers.model)

    with ThreadPoolExecutor(len(CLIENTS)) as pool:
        want = {name: pool.submit(ask, name, servers.whole) for name in CLIENTS}
    with ThreadPoolExecutor(ROUNDS * len(CLIENTS)) as pool:
        got = {
            name: [pool.submit(ask, name, servers.sharded) for _ in range(ROUNDS)]
            for name in CLIENTS
        }
    return {name: (want[name], got[name]) for name in CLIENTS}


def assert_alike(want: Any, got: Any) -> None:
    """The same, but for the last digits of logprobs."""
    if isinstance(want, float):
        assert got == pytest.approx(want, abs=TIE)
    elif isinstance(want, dict):
        assert want.keys() == got.keys()
        for key, value in want.items():
            assert_alike(value, got[key])
    elif isinstance(want, list):
        assert len(want) == len(got)
        for one, other in zip(want, got, strict=True):
            assert_alike(one, other)
    else:
        assert want == got


@pytest.mark.parametrize("name", CLIENTS)
def test_answers(answers: dict[str, tuple[Future[Any], list[Future[Any]]]], name: str) -> None:
    want, every = answers[name]
    for got in every:
        assert_alike(want.result(), got.result())


def _bench(model: str, url: str, folder: str) -> dict[str, Any]:
    """What `vllm bench serve` says of the server; runs in a process of its own."""
    from vllm.entrypoints.cli.main import main

    sys.argv = [
        *("vllm", "bench", "serve", "--model", model, "--base-url", url.removesuffix("/v1")),
        *("--dataset-name", "random", "--random-input-len", "30", "--random-output-len", "8"),
        *("--random-range-ratio", "0.6", "--num-prompts", str(REQUESTS)),
        *("--max-concurrency", str(AT_ONCE), "--ignore-eos", "--temperature", "0"),
        *("--save-result", "--save-detailed", "--result-dir", folder),
        *("--result-filename", "bench.json", "--disable-tqdm"),
    ]
    main()
    found: dict[str, Any] = json.loads((Path(folder) / "bench.json").read_text())
    return found


def test_bench_serve(servers: Servers, engines: Callable[[int], Engines], tmp_path: Path) -> None:
    found = []
    for served in (servers.sharded, servers.whole):
        (one,) = engines(1).run(_bench, servers.model, served.url, str(tmp_path))
        assert one["completed"] == REQUESTS, one["errors"]
        found.append(one)
    assert found[0]["output_lens"] == found[1]["output_lens"]
    assert found[0]["generated_texts"] == found[1]["generated_texts"]


def test_what_ran(servers: Servers) -> None:
    log = servers.sharded.log.read_text()
    assert "ApiServer_3" in log
    assert "fgtp: ranks 0 to 1 share embedding over 2, oproj over 2, mlp over 2, lmhead" in log
    assert "fgtp: ranks" not in servers.whole.log.read_text()

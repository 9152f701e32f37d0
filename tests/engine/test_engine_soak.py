"""Two minutes of random traffic on two ranks of `vllm serve`; `make soak` does thirty.

Bursts, single requests and rests, streams, clients that leave, and too few blocks of KV cache for
all, so that requests are preempted: every token is that of one unsharded rank, nothing is lost, and
the memory of no process grows.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

from engines import Answer, shared
from fork_server import ForkServer
from random_checkpoints import Checkpoints
from servers import serving
from soak import Soak
from test_engine_tokens import TIE

SECONDS = float(os.environ.get("FGTP_SOAK_SECONDS", "120"))
DRAWN, NEW_TOKENS = 40, 48
GROWTH = 24.0  # MiB; Python's and the allocator's noise


def _prompts() -> dict[int, list[int]]:
    source = random.Random(1)
    return {
        i: [source.randrange(1, 500) for _ in range(source.randrange(3, 75))] for i in range(DRAWN)
    }


def _decided(answer: Answer) -> dict[int, list[int]]:
    """The tokens of prompts of which none is a near tie, which the batch could decide."""

    def gap(logprobs: dict[int, float]) -> float:
        first, second, *_ = sorted(logprobs.values(), reverse=True)
        return first - second

    return {i: t for i, t in answer.tokens.items() if min(map(gap, answer.logprobs[i])) > 10 * TIE}


def test_random_traffic(
    checkpoint: Checkpoints,
    unsharded: Callable[..., Answer],
    server: Callable[..., ForkServer],
    tmp_path: Path,
) -> None:
    given = _prompts()
    lengths = {"max_tokens": NEW_TOKENS}
    want = _decided(unsharded("llama", {"prompts": given, "sampling": lengths}))
    assert len(want) > DRAWN / 2
    few_blocks = ("--block-size", "32", "--num-gpu-blocks-override", "14")
    one_server = ("--api-server-count", "1")  # forked, two would share no metrics
    sizes = json.dumps(shared()["additional_config"])
    arguments = ("--data-parallel-size", "2", "-cc.passes=fgtp", "--additional-config", sizes)
    model = checkpoint("llama")
    arguments += (*few_blocks, *one_server)
    # oneDNN keeps the kernels of a thousand shapes: it would fill for an hour, as in plain vLLM
    few_kernels = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16"}
    folder = tmp_path / "served"
    with serving(server(), folder, model, *arguments, environment=few_kernels) as served:
        soaked = Soak(served, model, {i: given[i] for i in want}, want).run(SECONDS)
        log = served.log.read_text()
    print(soaked)
    assert not soaked.wrong
    assert not soaked.lost, log[-20000:]
    assert soaked.preemptions
    assert min(soaked.did[kind] for kind in ("whole", "stream", "leave")) > 0
    assert max(soaked.growth().values()) < GROWTH, soaked.memory

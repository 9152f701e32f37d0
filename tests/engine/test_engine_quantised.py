"""Quantised layers are sharded with their scales, as in tensor parallelism."""

from pathlib import Path
from typing import Any

import pytest
from checkpoints import Checkpoints, parts, prompts
from engines import Job, shared
from quantised import write_int8
from test_engine_tokens import assert_same


@pytest.mark.slow
def test_int8_is_what_tensor_parallelism_gives(
    engines: Any, checkpoint: Checkpoints, tmp_path: Path
) -> None:
    """Activations are quantised per token and shard, so the reference is stock vLLM at TP=2."""
    model = write_int8(checkpoint("llama"), tmp_path / "int8")
    given = prompts()
    want = engines(1)(Job(model, given, {"tensor_parallel_size": 2, "enforce_eager": True}))[0]
    got = engines(2)(
        *[Job(model, {i: given[i] for i in part}, shared()) for part in parts(len(given), 2)]
    )
    assert_same(want, got, tie=0.1)  # a sum in another order rounds to another int8
    sites = {site[0] for site in got[0].found[0]["sites"]}
    assert sites == {"embedding", "oproj", "mlp", "lmhead"}

"""Quantised layers are sharded with their scales, as in tensor parallelism."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import COMPONENTS, Job, merged, shared
from marks import full
from quantised import write_int4, write_int8
from random_checkpoints import Checkpoints, parts, prompts
from test_engine_tokens import assert_same


@full
@pytest.mark.parametrize(
    ("write", "dtype", "tie"),
    [
        # a sum in another order rounds to another int8
        pytest.param(write_int8, "float32", 0.1, id="int8_w8a8"),
        pytest.param(
            *(write_int4, "bfloat16", 0.1),  # the kernel takes no float32
            marks=pytest.mark.skipif(
                not torch.cpu._is_avx512_supported(),
                reason="vLLM's CPU build has a kernel for int4 only with AVX-512",
            ),
            id="int4_w4a16",
        ),
    ],
)
def test_what_tensor_parallelism_gives(
    engines: Any,
    checkpoint: Checkpoints,
    tmp_path: Path,
    write: Callable[..., str],
    dtype: str,
    tie: float,
) -> None:
    """Activations are quantised per token and shard, so the reference is stock vLLM at TP=2."""
    model = write(checkpoint("llama"), tmp_path / "quantised")
    given = prompts()
    whole = {"tensor_parallel_size": 2, "enforce_eager": True, "dtype": dtype}
    want = engines(1)(Job(model, given, whole, processes="fork"))[0]
    half = merged(shared(*COMPONENTS, "qkv"), {"dtype": dtype})
    got = engines(2)(
        *[Job(model, {i: given[i] for i in part}, half) for part in parts(len(given), 2)]
    )
    assert_same(want, got, tie=tie)
    sites = {site[0] for site in got[0].found[0]["sites"]}
    assert sites == {*COMPONENTS, "qkv"}

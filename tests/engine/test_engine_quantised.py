"""Quantised layers are sharded with their scales, as in tensor parallelism."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import Job, merged, shared
from marks import full
from quantised import write_int4, write_int8
from random_checkpoints import CHECKPOINTS, Checkpoints, parts, prompts
from test_engine_tokens import assert_same

# vLLM's kernels for AMX are others: that for int8 takes no float32, and both round to bfloat16, in
# which logits near 5 are 0.03 apart
AMX = torch.cpu._is_amx_tile_supported()
# a sum in another order rounds to another int8
INT8 = (write_int8, "bfloat16" if AMX else "float32", 0.2 if AMX else 0.1)
# the kernel takes no float32
INT4 = (write_int4, "bfloat16", 0.2 if AMX else 0.1)
NO_INT4 = pytest.mark.skipif(
    not torch.cpu._is_avx512_supported(),
    reason="vLLM's CPU build has a kernel for int4 only with AVX-512",
)


@full
@pytest.mark.parametrize(
    ("name", "opt_in", "write", "dtype", "tie"),
    [
        pytest.param("llama", "qkv", *INT8, id="int8_w8a8"),
        pytest.param("llama", "qkv", *INT4, marks=NO_INT4, id="int4_w4a16"),
        pytest.param("qwen2_moe", "sharedexpert", *INT8, id="int8_w8a8-shared_experts"),
        pytest.param(
            *("qwen2_moe", "sharedexpert", *INT4), marks=NO_INT4, id="int4_w4a16-shared_experts"
        ),
    ],
)
def test_what_tensor_parallelism_gives(
    engines: Any,
    checkpoint: Checkpoints,
    tmp_path: Path,
    name: str,
    opt_in: str,
    write: Callable[..., str],
    dtype: str,
    tie: float,
) -> None:
    """Activations are quantised per token and shard, so the reference is stock vLLM at TP=2."""
    model = write(checkpoint(name), tmp_path / "quantised")
    given = prompts()
    whole = {"tensor_parallel_size": 2, "enforce_eager": True, "dtype": dtype}
    want = engines(1)(Job(model, given, whole, processes="fork"))[0]
    asked = {*CHECKPOINTS[name].components, opt_in}
    half = merged(CHECKPOINTS[name].options, shared(*asked), {"dtype": dtype})
    got = engines(2)(
        *[Job(model, {i: given[i] for i in part}, half) for part in parts(len(given), 2)]
    )
    assert_same(want, got, tie=tie)
    sites = {site[0] for site in got[0].found[0]["sites"]}
    assert sites == asked

"""The pass without sizes: the planner chooses, and the log says what and why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engines import COMPONENTS, Answer
from test_engine_tokens import assert_same


@pytest.mark.parametrize(
    ("options", "sharded_components", "said"),
    [
        ({"objective": "memory", "hardware": "h200"}, {*COMPONENTS, "qkv"}, "(on NVIDIA H200"),
        # a tiny model reads its weights faster than any message travels; measured, here and now
        ({"objective": "latency", "decode_batch": 4}, set(), "measuring the machine"),
    ],
    ids=["memory", "latency"],
)
def test_auto(
    unsharded: Callable[..., Answer],
    sharded: Callable[..., list[Answer]],
    engines: Any,
    tmp_path: Path,
    options: dict[str, Any],
    sharded_components: set[str],
    said: str,
) -> None:
    given = {
        "compilation_config": {"passes": ["fgtp"]},
        "additional_config": {"fgtp_options": options},
    }
    got = sharded("llama", given, environment={"FGTP_CACHE_DIR": str(tmp_path)})
    assert_same(unsharded("llama"), got)
    for answer in got:
        assert {site[0] for site in answer.found[0]["sites"]} == sharded_components
    log = engines(2).log(0)
    assert said in log
    for component in COMPONENTS:
        assert f"auto: {component}: {2 if sharded_components else 'off'}, " in log

"""Pipeline stages: data-parallel ranks share the layers of one stage; the tokens are those of one
rank that has all layers.
"""

from collections.abc import Callable

import pytest
from engines import TWO_STAGES, WARMED_UP, Answer, merged, shared
from marks import full
from test_engine_tokens import assert_same


@pytest.mark.parametrize(
    ("name", "runner"),
    [
        ("llama", "v1"),
        pytest.param("qwen3", "v1", marks=full),  # tied: both stages have the table
        pytest.param("glm4_moe", "v2", marks=full),  # no graph; a dense FFN on the first alone
    ],
)
def test_two_stages(
    name: str, runner: str, unsharded: Callable[..., Answer], sharded: Callable[..., list[Answer]]
) -> None:
    options, environment = merged(shared(), TWO_STAGES), WARMED_UP
    if name == "glm4_moe":  # three layers; vLLM wants experts on each stage
        environment = environment | {"VLLM_PP_LAYER_PARTITION": "2,1"}
    got = sharded(name, options, runner=runner, environment=environment, processes="fork")
    want = unsharded(name)
    assert_same(want, got)
    for answer in got:
        first, last = answer.found
        of_first, of_last = ({site[0] for site in stage["sites"]} for stage in (first, last))
        assert of_first == {"embedding", "oproj", "mlp"}
        assert of_last == {"oproj", "lmhead"} | ({"mlp"} if name != "glm4_moe" else set())
        cut = [fqn for stage in (first, last) for site in stage["sites"] for fqn in site[2]]
        assert len({*cut}) == len(cut) - (name == "qwen3")
        whole = sum(stage["bytes"] + stage["saved"] for stage in (first, last))
        table = 512 * 128 * 4 if name == "qwen3" else 0
        assert whole == want.found[0]["bytes"] + table

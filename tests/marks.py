"""The three sizes of the test suite: `make quick`, `make test`, `make test-all`.

A test without a mark belongs to the last two. `quick` adds it to the first, `full` leaves it to the
last.
"""

from collections.abc import Iterable
from typing import Any

import pytest
import zoo

quick = pytest.mark.quick
full = pytest.mark.full

# Between them: weights as [out, in] and as [in, out], separate and fused projections, biases, norms
# in every place, attention beside FFN, tied weights, experts with and without shared ones, MLA.
TYPICAL = ("llama", "gemma3", "gpt2", "falcon", "phi3", "qwen2_moe", "deepseek_v3", "llama4")
QUICK = ("llama", "gpt2", "deepseek_v3")


def architectures(names: Iterable[str] = zoo.ARCHITECTURES) -> list[Any]:
    """Names as parameters: `quick` for a few, `full` for all but the typical ones."""
    return [
        pytest.param(name, marks=quick if name in QUICK else () if name in TYPICAL else full)
        for name in names
    ]


def typical(names: Iterable[str] = zoo.ARCHITECTURES, *kept: str) -> list[Any]:
    """Names as parameters: `full` for all but those kept, by default the typical ones."""
    return [pytest.param(name, marks=() if name in (kept or TYPICAL) else full) for name in names]

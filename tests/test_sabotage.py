"""Tests of the tests: without one of its collectives a component must come out wrong."""

from typing import Any

import pytest
import torch
from decoding import compare_with_unsharded, sizes
from ranks import Pools

from fgtp_pass.collectives import functional

PATHS = {
    # joined
    "oproj mlp": ("all_to_all", "all_reduce", "reduce_scatter"),
    "embedding": ("all_gather", "reduce_scatter"),
    "lmhead": ("all_gather", "all_to_all"),
    "oproj": ("all_gather", "all_to_all"),
    "mlp": ("all_gather", "reduce_scatter"),
    "qkv": ("all_gather", "all_to_all"),
}


def _without(collective: str, components: str) -> dict[str, Any]:
    """The collective keeps its shapes, but only ever sees this rank's own data."""

    def local_gather(emit: Any, group: Any, x: Any) -> Any:
        return emit(torch.cat, [x] * group.size)

    def local_exchange(emit: Any, group: Any, x: Any, rows: Any) -> Any:
        return emit(torch.clone, x)

    def local_scatter(emit: Any, group: Any, x: Any, rows: Any, features: int) -> Any:
        return emit(torch.narrow, x, 0, 0, rows)

    def local_reduce(emit: Any, group: Any, x: Any, rows: Any, features: int) -> Any:
        return emit(torch.clone, x)

    fakes = {
        "all_gather": local_gather,
        "all_to_all": local_exchange,
        "reduce_scatter": local_scatter,
        "all_reduce": local_reduce,
    }
    real = getattr(functional, collective)
    setattr(functional, collective, fakes[collective])
    try:
        wanted = sizes(**dict.fromkeys(components.split(), 2))
        return compare_with_unsharded("llama", wanted, steps=0)
    finally:
        setattr(functional, collective, real)


@pytest.mark.parametrize(
    ("components", "collective"), [(c, step) for c, steps in PATHS.items() for step in steps]
)
def test_dropping_a_collective_is_noticed(ranks: Pools, components: str, collective: str) -> None:
    results = ranks(2).run(_without, collective, components)
    assert max(result["max"] for result in results) > 1e-3

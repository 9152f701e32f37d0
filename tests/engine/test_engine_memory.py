"""What a rank holds while a model is loaded, of a model large enough to see it."""

from collections.abc import Callable

from engines import Answer, shared
from marks import full

WATCHED = {"FGTP_TEST_MEMORY": "1"}
PLANNING = 40 << 20  # bytes that the trace of the plan takes, whatever the model's size
LARGEST = 32000 * 1024 * 4 // 2  # bytes of the largest shard, half of the embedding


@full
def test_peak_at_load(
    unsharded: Callable[..., Answer], sharded: Callable[..., list[Answer]]
) -> None:
    """As much as stock vLLM takes for as many bytes of weights, and never a whole weight."""
    whole = unsharded("llama_0.1b", {"environment": WATCHED}).found[0]
    for answer in sharded("llama_0.1b", shared(), environment=WATCHED):
        (found,) = answer.found
        share = found["bytes"] / whole["bytes"]
        assert share < 0.55
        memory = found["memory"]
        assert memory["peak"] <= memory["taken"] + LARGEST
        assert memory["peak"] <= whole["memory"]["peak"] * share + PLANNING

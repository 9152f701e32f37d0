"""Greedy tokens of two data-parallel ranks that share their weights are those of one rank."""

from collections.abc import Callable

import pytest
from engines import Answer, shared
from random_checkpoints import CHECKPOINTS

TIE = 1e-4  # of logprobs; fp32 sums in another order differ by less


def assert_same(want: Answer, got: list[Answer], tie: float = TIE) -> None:
    """Tokens are the same up to a numeric tie, and the logprobs up to there are too."""
    numbers = sorted(i for answer in got for i in answer.tokens)
    assert numbers == sorted(want.tokens)
    for answer in got:
        for i, tokens in answer.tokens.items():
            expected, before, after = want.tokens[i], want.logprobs[i], answer.logprobs[i]
            assert len(tokens) == len(expected)
            for at, (a, b) in enumerate(zip(expected, tokens, strict=True)):
                assert b in before[at], f"prompt {i}, token {at}: {before[at]} and {after[at]}"
                assert after[at][b] == pytest.approx(before[at][b], abs=tie), f"prompt {i} at {at}"
                if a != b:
                    gap = before[at][a] - before[at][b]
                    assert gap < tie, f"prompt {i}, token {at}: {before[at]} and {after[at]}"
                    print(f"prompt {i}: a tie at token {at}, {gap:.1e} apart")
                    break


@pytest.mark.parametrize(
    "name", ["llama", "qwen3", "qwen2", "gemma3", "mixtral", "qwen3_moe", "deepseek_v3"]
)
def test_tokens(
    name: str,
    unsharded: Callable[..., Answer],
    sharded: Callable[..., list[Answer]],
) -> None:
    got = sharded(name, shared(*CHECKPOINTS[name].components))
    assert_same(unsharded(name), got)
    whole = unsharded(name).found[0]["bytes"]
    for answer in got:
        (found,) = answer.found
        assert found["saved"] > 0
        assert found["bytes"] == whole - found["saved"]

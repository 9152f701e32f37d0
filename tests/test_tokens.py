"""The token contract: equal counts are checked, ragged ones padded, idle ranks take part."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
import zoo
from decoding import compare_with_unsharded, prompts, relative_errors, sizes
from marks import quick, typical
from ranks import Pools

import fgtp_pass
from fgtp_pass import fgtp_backend


def compiled(model: Any, tokens: str, inner: str = "eager", **options: Any) -> Any:
    given = {
        "finegrained_tp_config": sizes(2),
        "inner_backend": inner,
        "tokens": tokens,
        **options,
    }
    return torch.compile(model, backend=fgtp_backend, options=given)


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor, **call: Any) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False, **call).logits


def own_prompt(batch: int, length: int) -> torch.Tensor:
    return prompts(dist.get_rank(), batch, length, 160)


def _mismatch(shapes: list[tuple[int, int]], warm: bool) -> None:
    fast = compiled(zoo.build("llama"), "equal")
    if warm:
        for length in (4, 5, 6):
            logits(fast, own_prompt(2, length))
    logits(fast, own_prompt(*shapes[dist.get_rank()]))


@quick
@pytest.mark.parametrize("warm", [False, True])
def test_unequal_counts_are_an_error_with_each_ranks_count(ranks: Pools, warm: bool) -> None:
    outcomes = ranks(2).outcomes(_mismatch, [(2, 7), (2, 9)], warm)
    for outcome in outcomes:
        assert "rank 0: embedding 14" in outcome.message
        assert "rank 1: embedding 18" in outcome.message
        assert "ragged" in outcome.message


def _mismatch_of_logits() -> None:
    """The hidden states agree in number, the rows that go through the lm_head do not."""
    fast = compiled(zoo.build("llama"), "equal")
    logits(fast, own_prompt(2, 6), logits_to_keep=1 + dist.get_rank())


def test_unequal_logits_to_keep_are_an_error(ranks: Pools) -> None:
    for outcome in ranks(2).outcomes(_mismatch_of_logits):
        assert outcome.error == "TokenCountError"
        assert "lmhead 2" in outcome.message
        assert "lmhead 4" in outcome.message


def _check_off() -> float:
    model = zoo.build("llama")
    ids = own_prompt(2, 6)
    want = logits(model, ids)
    fast = compiled(model, "equal", check_tokens=False)
    got = logits(fast, ids)
    with pytest.raises(fgtp_pass.AgreementError, match="check_tokens=True"):
        fgtp_pass.idle_step(fast)
    return relative_errors(got, want)[0]


def test_the_check_can_be_turned_off(ranks: Pools) -> None:
    assert max(ranks(2).run(_check_off)) < 1e-5


RAGGED = ("llama", "gpt2", "phi", "deepseek_v3", "qwen3")


@pytest.mark.parametrize("name", typical(RAGGED, "gpt2", "deepseek_v3"))
def test_ragged_batches_and_lengths(ranks: Pools, name: str) -> None:
    results = ranks(2).run(
        compare_with_unsharded, name, sizes(2), tokens="ragged", lengths=(5, 8), steps=2
    )
    assert all(result["max"] <= 1e-5 and result["same_tokens"] for result in results)


def test_ragged_on_four_ranks_in_two_groups(ranks: Pools) -> None:
    results = ranks(4).run(compare_with_unsharded, "llama", sizes(2), tokens="ragged", steps=2)
    assert all(result["max"] <= 1e-5 for result in results)


def test_ragged_with_inductor(ranks: Pools) -> None:
    """phi's attention and FFN run side by side, so nothing but the pass orders collectives."""
    results = ranks(2).run(
        compare_with_unsharded,
        "phi",
        sizes(2),
        tokens="ragged",
        inner="inductor",
        lengths=(5, 8),  # static sizes, then dynamic ones
        steps=0,
    )
    assert all(result["max"] <= 1e-5 for result in results)


def _ragged_recompiles() -> list[int]:
    model = zoo.build("llama")
    graphs: list[int] = []

    def inner(gm: Any, inputs: Any) -> Any:
        graphs.append(1)
        return gm.forward

    fast = compiled(model, "ragged", inner)
    counts = []
    for i, length in enumerate((4, 6, 9, 3, 10, 8, 5)):
        mine = length if dist.get_rank() == 0 else (7, 7, 2, 10, 6, 3, 10)[i]
        ids = own_prompt(2, mine)
        want_shape = (2, mine, 160)
        assert logits(fast, ids).shape == want_shape
        counts.append(len(graphs))
    return counts


def test_ragged_counts_cause_no_recompile_after_the_first_dynamic_one(ranks: Pools) -> None:
    for counts in ranks(2).run(_ragged_recompiles):
        assert counts[-1] == 2


def _idle(tokens: str, name: str) -> float:
    """Rank 1 has no requests in every other step; rank 0's results must not change."""
    model = zoo.build(name)
    rank = dist.get_rank()
    steps = [own_prompt(2, length) for length in (5, 5, 6, 7, 8)]
    want = [logits(model, ids) for ids in steps]
    fast = compiled(model, tokens)
    worst = 0.0
    for i, ids in enumerate(steps):
        if rank == 1 and i % 2 == 1:
            fgtp_pass.idle_step(fast)
        else:
            worst = max(worst, relative_errors(logits(fast, ids), want[i])[0])
    fgtp_pass.idle_step(fast)  # a step in which all idle
    return worst


@pytest.mark.parametrize("tokens", ["equal", "ragged"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_idle_ranks_take_part(ranks: Pools, tokens: str, name: str) -> None:
    assert max(ranks(2).run(_idle, tokens, name)) < 1e-5


def _idle_before_any_step() -> None:
    fgtp_pass.idle_step(compiled(zoo.build("llama"), "equal"))


def test_idle_before_any_step_is_an_error(ranks: Pools) -> None:
    for outcome in ranks(2).outcomes(_idle_before_any_step):
        assert outcome.error == "AgreementError"
        assert "warm-up" in outcome.message

"""Ranks that disagree, or of which one fails, all end with that rank's reason."""

from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
import zoo
from decoding import prompts, relative_errors, sizes
from ranks import Outcome, Pools
from torch import nn

import fgtp_pass
from fgtp_pass import fgtp_backend
from fgtp_pass.collectives.board import Board, BoardLostError
from fgtp_pass.errors import first_line


@torch.no_grad()
def step(model: Any, length: int = 4) -> torch.Tensor:
    return model(input_ids=prompts(dist.get_rank(), 2, length, 160), use_cache=False).logits


def untouched(model: nn.Module) -> None:
    assert fgtp_pass.applied_plan(model) is None
    model.state_dict()


def _options_by_rank(by_rank: list[dict[str, Any]]) -> None:
    model = zoo.build("llama")
    want = step(model)
    options = {"inner_backend": "eager", **by_rank[dist.get_rank()]}
    try:
        step(torch.compile(model, backend=fgtp_backend, options=options))
    finally:
        untouched(model)
        assert torch.equal(step(model), want)


def outcomes(ranks: Pools, *by_rank: dict[str, Any]) -> list[Outcome]:
    return ranks(2).outcomes(_options_by_rank, list(by_rank))


def test_different_sizes(ranks: Pools) -> None:
    one = {"finegrained_tp_config": sizes(2)}
    two = {"finegrained_tp_config": sizes(oproj=2)}
    for outcome in outcomes(ranks, one, two):
        assert outcome.error == "AgreementError"
        assert "rank 0 has" in outcome.message
        assert "rank 1 has" in outcome.message


def test_sharding_on_one_rank_only(ranks: Pools) -> None:
    off = {"finegrained_tp_config": {}}
    for outcome in outcomes(ranks, {"finegrained_tp_config": sizes(2)}, off):
        assert outcome.error == "AgreementError"


def test_different_token_contracts(ranks: Pools) -> None:
    config = {"finegrained_tp_config": sizes(2)}
    for outcome in outcomes(ranks, config, {**config, "tokens": "ragged"}):
        assert "differ in tokens: rank 0 has equal; rank 1 has ragged" in outcome.message


def test_bad_options_on_one_rank(ranks: Pools) -> None:
    good = {"finegrained_tp_config": sizes(2)}
    bad = {"finegrained_tp_config": {"oproj_tensor_parallel_sise": 2}}
    first, second = outcomes(ranks, good, bad)
    assert second.error == "ConfigError"
    assert first.error == "AgreementError"
    assert "rank 1 failed: ConfigError" in first.message
    assert "oproj_tensor_parallel_size" in first.message


def test_bad_options_on_every_rank(ranks: Pools) -> None:
    bad = {"finegrained_tp_config": {"oproj_tensor_parallel_size": 3}}
    for outcome in outcomes(ranks, bad, bad):
        assert "does not divide the data-parallel size 2" in outcome.message


def _different_models() -> None:
    model = zoo.build("llama", num_hidden_layers=2 + dist.get_rank())
    options = {"finegrained_tp_config": sizes(2), "inner_backend": "eager"}
    try:
        step(torch.compile(model, backend=fgtp_backend, options=options))
    finally:
        untouched(model)


def test_different_models(ranks: Pools) -> None:
    for outcome in ranks(2).outcomes(_different_models):
        assert outcome.error == "AgreementError"
        assert "differ in plan" in outcome.message


def _other_weights(change: Any, **options: Any) -> float:
    """Rank 1 changes its model before the first step, which must leave it as it is."""
    model = zoo.build("llama")
    if dist.get_rank() == 1:
        change(model)
    want = step(model)
    config = {"finegrained_tp_config": sizes(2), "inner_backend": "eager", **options}
    fast = torch.compile(model, backend=fgtp_backend, options=config)
    try:
        got = step(fast)
    except fgtp_pass.AgreementError:
        untouched(model)
        assert torch.equal(step(model), want)
        raise
    return relative_errors(got, want)[0]


def _other_seed(model: nn.Module) -> None:
    model.load_state_dict(zoo.build("llama", seed=1).state_dict())


@torch.no_grad()
def _one_bit(model: nn.Module) -> None:
    model.model.layers[1].mlp.up_proj.weight.view(torch.int32)[3, 5] ^= 1


@torch.no_grad()
def _not_cut(model: nn.Module) -> None:
    model.model.layers[1].self_attn.q_proj.weight.mul_(2)


def test_different_weights(ranks: Pools) -> None:
    for outcome in ranks(2).outcomes(_other_weights, _other_seed):
        assert outcome.error == "AgreementError"
        assert "rank 1 differs from rank 0 in model.embed_tokens.weight, " in outcome.message
        assert " and 6 more" in outcome.message
    for outcome in ranks(2).outcomes(_other_weights, _one_bit):
        assert "rank 1 differs from rank 0 in model.layers.1.mlp.up_proj.weight. " in (
            outcome.message
        )
    # a weight that stays whole is each rank's own business, and what is asked for is done
    assert max(ranks(2).run(_other_weights, _not_cut)) < 1e-5
    ranks(2).run(_other_weights, _one_bit, check_weights=False)


class Broken(RuntimeError):
    pass


def _inner_fails_on(failing: int, at_graph: int) -> None:
    """The inner backend fails on one rank, in its first or in a later graph."""
    model = zoo.build("llama")
    want = step(model, 4), step(model, 6)
    graphs: list[int] = []

    def inner(gm: Any, inputs: Any) -> Any:
        graphs.append(1)
        if dist.get_rank() == failing and len(graphs) == at_graph:
            raise Broken("no compiler here")
        return gm.forward

    options = {"finegrained_tp_config": sizes(2), "inner_backend": inner}
    fast = torch.compile(model, backend=fgtp_backend, options=options)
    try:
        step(fast, 4)
        step(fast, 6)
    finally:
        if at_graph == 1:  # nothing is lost
            untouched(model)
            assert torch.equal(step(model, 4), want[0])
        else:
            fgtp_pass.unshard(model)
            assert relative_errors(step(model, 6), want[1])[0] < 1e-6


@pytest.mark.parametrize("at_graph", [1, 2])
def test_a_rank_that_fails_to_compile(ranks: Pools, at_graph: int) -> None:
    first, second = ranks(2).outcomes(_inner_fails_on, 1, at_graph)
    assert "no compiler here" in second.message
    assert first.error == "AgreementError"
    assert "rank 1 failed" in first.message
    assert "no compiler here" in first.message


def _works_afterwards() -> float:
    model = zoo.build("llama")
    want = step(model)
    options = {"finegrained_tp_config": sizes(2), "inner_backend": "eager"}
    return relative_errors(step(torch.compile(model, backend=fgtp_backend, options=options)), want)[
        0
    ]


def test_the_group_still_works_after_all_this(ranks: Pools) -> None:
    assert max(ranks(2).run(_works_afterwards)) < 1e-5


def _different_graphs() -> None:
    """Both ranks compiled both models; then they run different ones."""
    models = [zoo.build("llama", seed=1), zoo.build("llama", seed=1, num_hidden_layers=3)]
    options = {"finegrained_tp_config": sizes(2), "inner_backend": "eager"}
    fast = [torch.compile(m, backend=fgtp_backend, options=options) for m in models]
    for model in fast:
        step(model)
    step(fast[dist.get_rank()])


def test_ranks_that_run_different_models_in_one_step(ranks: Pools) -> None:
    for outcome in ranks(2).outcomes(_different_graphs):
        assert outcome.error == "AgreementError"
        assert "different sites" in outcome.message


def _dies() -> None:
    model = zoo.build("llama")
    options = {"finegrained_tp_config": sizes(2), "inner_backend": "eager"}
    fast = torch.compile(model, backend=fgtp_backend, options=options)
    step(fast)
    if dist.get_rank() == 1:
        import os

        os._exit(1)
    step(fast)


def test_a_rank_that_dies(ranks: Pools) -> None:
    first, second = ranks(2).outcomes(_dies)
    assert second.error == "RankDied"
    assert first.error == "AgreementError"
    assert "rank 1 ended and does not answer" in first.message
    ranks(2).kill()


class _StoreOfPython(dist.Store):  # type: ignore[misc]
    """A store that is no connection, and so has no `clone`."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, bytes] = {}

    def set(self, key: str, value: bytes) -> None:
        self.values[key] = value

    def get(self, key: str) -> bytes:
        return self.values[key]

    def check(self, keys: list[str]) -> bool:
        return all(key in self.values for key in keys)


class _GroupWith:
    def __init__(self, store: Any) -> None:
        self.store = store

    def get_group_store(self) -> Any:
        return self.store


def test_a_board_on_a_store_without_connections() -> None:
    board = Board(_GroupWith(_StoreOfPython()))  # type: ignore[arg-type]
    board.write("key", (1, "two"))
    assert board.read(["key", "other"]) == {"key": (1, "two")}


def test_a_board_on_a_store_that_is_gone_says_so() -> None:
    second = timedelta(seconds=1)
    keeper = dist.TCPStore("127.0.0.1", 0, None, True, second, wait_for_workers=False)
    store = dist.TCPStore("127.0.0.1", keeper.port, None, False, second)
    Board(_GroupWith(store))  # type: ignore[arg-type]
    del keeper
    with pytest.raises(BoardLostError, match="does not answer"):
        Board(_GroupWith(store))  # type: ignore[arg-type]


def test_an_error_without_text_is_named_by_its_class() -> None:
    assert first_line(AssertionError()) == "AssertionError"
    assert first_line(ValueError("one\ntwo")) == "ValueError: one"

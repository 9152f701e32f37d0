"""Decode moves tokens, prefill weights: where one becomes the other, and that both are right."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
import zoo
from decoding import decode, prompts, relative_errors, sizes
from marks import full
from ranks import Pools
from torch import nn

import fgtp_pass
from fgtp_pass import fgtp_backend, make_plan
from fgtp_pass.algebra.path import StageShape, legal_paths
from fgtp_pass.algebra.placement import Cut
from fgtp_pass.cost.estimate import Cluster
from fgtp_pass.cost.hardware import load
from fgtp_pass.cost.path_seconds import path_seconds
from fgtp_pass.plan.plan import Plan

SHORT = 4  # tokens per sequence that move
LONG = 96  # tokens per sequence for which every weight of these models moves


def _plan(name: str = "llama", k: int = 2) -> Plan:
    model = zoo.build(name)
    ids = prompts(0, 2, 5, model.config.vocab_size)
    given: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    return make_plan(model, kwargs=given, finegrained_tp_config=sizes(k), data_parallel_size=2 * k)


def test_weights_move_where_they_are_fewer_bytes_than_the_tokens() -> None:
    """By hand for each site: what a rank sends of its shards, and of its tokens."""
    for k in (2, 4):
        plan = _plan(k=k)
        assert {site.component for site in plan.sites if site.ranges} == {"oproj", "mlp", "lmhead"}
        for site in plan.sites:
            if site.component == "embedding":
                continue
            shards = sum(w.nbytes for w in site.weights) * (k - 1) // k
            first = site.ranges[-1].from_tokens
            widths = [site.weights[0].shape[1], site.weights[-1].shape[0]]  # in, out
            if site.component == "mlp":
                per_token = 4 * (k - 1) * sum(widths)  # all_gather, reduce_scatter
            else:  # all_gather and all_to_all; or all_to_all and reduce_scatter
                across = [4 * (k - 1) * (widths[0] + widths[1] / k)]
                across += [4 * (k - 1) * (widths[0] / k + widths[1])] * (site.component == "oproj")
                per_token = min(across)
            assert shards < first * per_token
            assert shards >= (first - 1) * per_token
            assert "-all_gather-> W" in site.ranges[-1].path
            assert site.ranges[-1].collectives == ()
    text = str(plan)
    assert f"oproj from {_first(plan, 'oproj')} tokens per rank on: Own x (W/k" in text
    assert "a step that gathers weights takes up to " in text
    largest = max(w.nbytes for s in plan.sites if s.component != "embedding" for w in s.weights)
    assert plan.gathered_peak_bytes == 2 * largest


def _first(plan: Plan, component: str) -> int:
    return next(s.ranges[-1].from_tokens for s in plan.sites if s.component == component)


def test_by_time_tokens_move_in_decode_and_weights_in_a_long_prefill() -> None:
    seconds = path_seconds(Cluster(load("h100-sxm"), 8, 8))
    wide = 8192
    shape = StageShape((Cut.IN, Cut.OUT), 2 * wide, 2 * wide, 4 * wide, 2 * wide * wide, 1)
    paths = legal_paths([shape], 8)

    def best(tokens: int) -> str:
        return str(min(paths, key=lambda path: seconds(path, tokens, 8, "bfloat16")))

    assert "W/k" not in best(1).replace("[in/k]", "").replace("[out/k]", "")
    assert "(W/k -all_gather-> W)" in best(8192)


# in real ranks ------------------------------------------------------------------------------------


def _recording(runs: list[list[str]]) -> Any:
    """An inner backend that notes the collectives of each graph that it runs."""

    def inner(gm: Any, inputs: Any) -> Any:
        names = [str(n.target).split(".")[1] for n in gm.graph.nodes if "c10d" in str(n.target)]

        def run(*args: Any) -> Any:
            runs.append([name for name in names if name != "wait_tensor"])
            return gm.forward(*args)

        return run

    return inner


def _compiled(model: nn.Module, k: int, runs: list[list[str]], **options: Any) -> Any:
    given = {"finegrained_tp_config": sizes(k), "inner_backend": _recording(runs)} | options
    return torch.compile(model, backend=fgtp_backend, options=given)


def _generates(name: str, k: int, tokens: str) -> tuple[float, list[list[str]]]:
    """A long prefill and a few steps, one cache; then the next prompt, short on some ranks."""
    torch._dynamo.reset()
    rank, runs, worst = dist.get_rank(), list[list[str]](), 0.0
    model, whole = zoo.build(name), zoo.build(name)
    fast = _compiled(model, k, runs, tokens=tokens)
    for turn, length in enumerate((LONG, SHORT, LONG + 3)):
        alone = tokens == "ragged" and rank % 2 == turn % 2
        ids = prompts(rank, 2, SHORT if alone else length, model.config.vocab_size)
        want, chosen = decode(whole, ids, 3)
        got, _ = decode(fast, ids, 3, tokens=chosen)
        worst = max(worst, relative_errors(got, want)[0])
    return worst, runs


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("llama", "equal"),
        ("llama", "ragged"),
        # attention beside the FFN, norms on both sides, weights [in, out], experts and latents
        pytest.param("phi", "ragged", marks=full),
        pytest.param("gemma2", "equal", marks=full),
        pytest.param("gpt2", "ragged", marks=full),
        pytest.param("deepseek_v3", "equal", marks=full),
    ],
)
def test_prefill_by_weights_and_decode_by_tokens(ranks: Pools, name: str, tokens: str) -> None:
    for worst, runs in ranks(2).run(_generates, name, 2, tokens):
        assert worst <= 2e-5
        prefill, *decoding = runs[:4]
        assert all(names == decoding[0] for names in decoding), "tokens move in decode"
        # over gloo a table's sum is an all_to_all; nothing else but weights moves in the prefill
        assert prefill.count("all_to_all_single") <= 1 < decoding[0].count("all_to_all_single")
        assert prefill.count("all_gather_into_tensor") > decoding[0].count("all_gather_into_tensor")


@pytest.mark.parametrize("k", [2, 4])
def test_four_ranks(ranks: Pools, k: int) -> None:
    for worst, _ in ranks(4).run(_generates, "llama", k, "ragged"):
        assert worst <= 2e-5


def _steps_of_one_graph() -> tuple[list[float], list[list[str]]]:
    """One dynamic graph at many numbers of tokens, back and forth."""
    torch._dynamo.reset()
    model, whole, runs = zoo.build("llama"), zoo.build("llama"), list[list[str]]()
    fast = _compiled(model, 2, runs)
    errors = []
    for length in (3, SHORT, LONG, SHORT + 1, LONG + 1, 40, LONG + 2, SHORT):
        ids = prompts(dist.get_rank(), 2, length, model.config.vocab_size)
        with torch.no_grad():
            want = whole(input_ids=ids, use_cache=False).logits
            errors.append(relative_errors(fast(input_ids=ids, use_cache=False).logits, want)[0])
    return errors, runs


def test_one_graph_takes_each_path_in_turn(ranks: Pools) -> None:
    for errors, runs in ranks(2).run(_steps_of_one_graph):
        assert max(errors) <= 2e-5
        assert len(errors) == len(runs)
        assert runs[1] == runs[3] == runs[7]
        assert runs[2] == runs[4] == runs[6] != runs[1]


def _by_time() -> tuple[str, float]:
    """What the plan's paths were compared by, and the error."""
    torch._dynamo.reset()
    model, whole, runs = zoo.build("llama"), zoo.build("llama"), list[list[str]]()
    fast = _compiled(model, 2, runs, decode_batch=4, hardware="h100-sxm")
    ids = prompts(dist.get_rank(), 2, SHORT, model.config.vocab_size)
    with torch.no_grad():
        want = whole(input_ids=ids, use_cache=False).logits
        got = fast(input_ids=ids, use_cache=False).logits
    plan = fgtp_pass.applied_plan(fast)
    assert plan is not None
    return plan.paths_by, relative_errors(got, want)[0]


def test_a_declared_decode_batch_and_constants_choose_by_time(ranks: Pools) -> None:
    for by, error in ranks(2).run(_by_time):
        assert by.startswith("predicted time at 4 tokens per rank on NVIDIA H100")
        assert error <= 2e-5
    assert _plan().paths_by == "messages, then bytes"


def _idles(name: str, tokens: str, lengths: tuple[int, ...], idle: tuple[int, ...]) -> float:
    """Rank 1 idles in the steps `idle`, on paths that it never ran."""
    torch._dynamo.reset()
    model, whole, runs = zoo.build(name), zoo.build(name), list[list[str]]()
    fast = _compiled(model, 2, runs, tokens=tokens)
    worst = 0.0
    for step, length in enumerate(lengths):
        ids = prompts(dist.get_rank(), 2, length, model.config.vocab_size)
        if step in idle and dist.get_rank() == 1:
            assert fgtp_pass.idle_step(fast)
            continue
        with torch.no_grad():
            want = whole(input_ids=ids, use_cache=False).logits
            got = fast(input_ids=ids, use_cache=False).logits
        worst = max(worst, relative_errors(got, want)[0])
    return worst


@pytest.mark.parametrize("tokens", ["equal", "ragged"])
def test_a_rank_idles_in_a_prefill_that_it_never_ran(ranks: Pools, tokens: str) -> None:
    lengths = (3, SHORT, LONG, SHORT, LONG + 1)
    assert max(ranks(2).run(_idles, "llama", tokens, lengths, (2, 4))) <= 2e-5


def test_a_rank_idles_in_decode_before_it_has_decoded(ranks: Pools) -> None:
    """GPT-2's weights cannot be packed, which a graph that only gathers them does not show."""
    lengths = (LONG, LONG + 1, SHORT, LONG + 2)
    assert max(ranks(2).run(_idles, "gpt2", "equal", lengths, (2,))) <= 2e-5

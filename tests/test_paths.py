"""Every path computes the same: paths drawn by lot, in real ranks, against the unsharded model."""

import re
import zlib
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import zoo
from decoding import prompts, relative_errors, sizes
from marks import full
from ranks import Pools
from test_detection import missing

import fgtp_pass
from fgtp_pass import fgtp_backend
from fgtp_pass.algebra.path import Path
from fgtp_pass.backend import runtime
from fgtp_pass.plan.planner import PlannedGraph, plan_graph
from fgtp_pass.plan.prices import Prices

# blocks one after the other, beside each other, with norms on both sides, behind, and experts
BLOCKS = ("llama", "phi", "cohere", "gemma2", "olmo2", "gpt2", "qwen2_moe")
SHORT = {
    "phi": {},
    "qwen2_moe": {},
    "gemma2": {},
}  # with fewer layers they would lose what is to be tried


def drawn_by(seed: int, taken: set[str]) -> Callable[..., Any]:
    """What `plan_graph` does, with paths that a lot decides on, the same on every rank."""

    def price(path: Path) -> tuple[float, ...]:
        return (float(zlib.crc32(f"{seed} {path}".encode()) % 1000),)

    drawn = Prices(at=lambda tokens: lambda match: price, by_range=seed % 2 == 1)

    def plan(*args: Any, prices: Prices, joins: bool) -> PlannedGraph:
        planned = plan_graph(*args, prices=drawn, joins=joins)
        planned = planned.at((0,) * len(planned.ranges))
        taken.update(str(site.path) for site in planned.sites)
        return planned

    return plan


@torch.no_grad()
def _compare(name: str, seeds: range, tokens: str, k: int) -> tuple[float, list[str]]:
    """The largest error over all seeds, and the paths that were taken.

    An odd seed draws for one graph of any length, an even one for a graph of one length alone.
    """
    worst, taken = 0.0, set[str]()
    for seed in seeds:
        torch._dynamo.reset()
        model = zoo.build(name, **SHORT.get(name, {"num_hidden_layers": 1}))
        own = 5 + (dist.get_rank() if tokens == "ragged" else 0)
        lengths = (own, own + 1) if seed % 2 else (own,)
        ids = [prompts(dist.get_rank(), 2, length, 160) for length in lengths]
        want = [model(input_ids=i, use_cache=False).logits for i in ids]
        if seed % 2:
            torch._dynamo.maybe_mark_dynamic(ids[0], 1)
        with mock.patch.object(runtime, "plan_graph", drawn_by(seed, taken)):
            fast = torch.compile(
                model,
                backend=fgtp_backend,
                options={
                    "finegrained_tp_config": sizes(k),
                    "inner_backend": "eager",
                    "tokens": tokens,
                    "allow_missing": missing(name),
                    "process_group": dist.group.WORLD,
                },
            )
            got = [fast(input_ids=i, use_cache=False).logits for i in ids]
        worst = max(worst, *(relative_errors(g, w)[0] for g, w in zip(got, want, strict=True)))
        fgtp_pass.idle_step(fast)  # all idle: the idle program takes these paths too
    return worst, sorted(taken)


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        pytest.param(name, tokens, marks=full if name != "phi" or tokens == "equal" else ())
        for name in BLOCKS
        for tokens in ("equal", "ragged")
    ],
)
def test_drawn_paths_on_two_ranks(ranks: Pools, name: str, tokens: str) -> None:
    for worst, taken in ranks(2).run(_compare, name, range(2), tokens, 2):
        assert worst <= 1e-5, taken


def test_drawn_paths_take_every_move(ranks: Pools) -> None:
    """On three ranks, which no width here is a multiple of."""
    taken: set[str] = set()
    for name, seeds in (("llama", range(8)), ("phi", range(2))):
        (worst, paths), *_ = ranks(3).run(_compare, name, seeds, "equal", 3)
        assert worst <= 1e-5, paths
        taken |= set(paths)
    moves = set(re.findall(r"(?=(\w+)(?: \+ [\w ]+)? -(\w+)-> (\w+))", " ".join(taken)))
    assert moves >= {
        ("Own", "all_gather", "All"),
        ("Own", "all_to_all", "Cut"),
        ("Cut", "all_to_all", "Own"),
        ("Cut", "all_gather", "All"),
        ("Sum", "reduce_scatter", "Own"),
        ("Sum", "all_reduce", "All"),
        ("All", "slice", "Own"),
        ("All", "slice", "Cut"),
        ("k", "all_gather", "W"),
    }


def _one_idles(name: str) -> float:
    """Rank 1 idles in every other step; rank 0's results must not change."""
    model = zoo.build(name)
    ids = prompts(dist.get_rank(), 2, 5, 160)
    with torch.no_grad():
        want = model(input_ids=ids, use_cache=False).logits
        options = {"finegrained_tp_config": sizes(2), "inner_backend": "eager"}
        fast = torch.compile(model, backend=fgtp_backend, options=options)
        worst = 0.0
        for step in range(4):
            if dist.get_rank() == 1 and step % 2:
                fgtp_pass.idle_step(fast)
            else:
                got = fast(input_ids=ids, use_cache=False).logits
                worst = max(worst, relative_errors(got, want)[0])
    return worst


@pytest.mark.parametrize("name", ["phi", "gemma2"])
def test_an_idle_rank_does_its_part_of_joined_layers(ranks: Pools, name: str) -> None:
    assert max(ranks(2).run(_one_idles, name)) <= 1e-5

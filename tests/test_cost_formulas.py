"""The cost formulas: limits, units, monotonicity, crossovers."""

import math
from typing import Any

import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st
from marks import quick
from sympy import Symbol

from fgtp_pass.algebra.path import StageShape, legal_paths
from fgtp_pass.algebra.placement import Collective, Cut
from fgtp_pass.algebra.price import by_messages
from fgtp_pass.cost import formulas
from fgtp_pass.cost.formulas import (
    CHANGE_SECONDS,
    GROUP,
    MEMORY_BANDWIDTH,
    MOVED_BYTES,
    RANKS_PER_NODE,
    SHARDED_SECONDS,
    TOKENS,
    WHOLE_SECONDS,
    evaluate,
    last_paying,
)
from fgtp_pass.cost.hardware import load, profiles

pytestmark = quick

# an o_proj of [8192, 8192] in bf16: all_gather of its input, all_to_all of its output
SHAPE: dict[Symbol, Any] = {
    formulas.MATMULS: 1,
    formulas.ELEMENTS: 8192 * 8192,
    formulas.ELEMENT_BYTES: 2,
    formulas.ROW_BYTES: 0,
    **dict.fromkeys(formulas.COUNT.values(), 0),
    **dict.fromkeys(formulas.WIDTH.values(), 0),
    formulas.COUNT[Collective.ALL_GATHER]: 1,
    formulas.WIDTH[Collective.ALL_GATHER]: 16384,
    formulas.COUNT[Collective.ALL_TO_ALL]: 1,
    formulas.WIDTH[Collective.ALL_TO_ALL]: 16384,
}


def values(hardware: str = "h100-sxm", **given: float) -> dict[Symbol, Any]:
    symbols = {"tokens": TOKENS, "group": GROUP, "ranks_per_node": RANKS_PER_NODE}
    chosen = {symbols[name]: number for name, number in given.items()}
    return {**SHAPE, **load(hardware).values("bfloat16"), RANKS_PER_NODE: 8, **chosen}


# limits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [0, 1, 24, 4096])
def test_a_group_of_one_costs_nothing(tokens: int) -> None:
    assert evaluate(CHANGE_SECONDS, values(tokens=tokens, group=1)) == 0
    assert evaluate(MOVED_BYTES, values(tokens=tokens, group=1)) == 0


def test_without_tokens_only_latency_and_saved_reads_remain() -> None:
    given = values(tokens=0, group=8)
    saved = 8192 * 8192 * 2 / given[MEMORY_BANDWIDTH] * 7 / 8
    assert evaluate(MOVED_BYTES, given) == 0
    assert evaluate(CHANGE_SECONDS, given) == pytest.approx(latency(given, 8) - saved)


def latency(given: dict[Symbol, Any], size: int) -> float:
    """Of an all_gather and an all_to_all without bytes: the protocol for small messages."""
    return sum(
        given[formulas.SMALL_BASE_SECONDS["within_node", kind]]
        + (size - 1) * given[formulas.SMALL_PEER_SECONDS["within_node", kind]]
        for kind in (Collective.ALL_GATHER, Collective.ALL_TO_ALL)
    )


def test_with_infinite_bandwidths_only_latency_remains() -> None:
    given = values(tokens=16, group=8)
    links = (formulas.LINK_BANDWIDTH, formulas.SMALL_BANDWIDTH, formulas.PEER_BANDWIDTH)
    endless = {symbol: 1e30 for link in links for symbol in link.values()}
    endless |= dict.fromkeys((MEMORY_BANDWIDTH, formulas.MATMUL_RATE), 1e30)
    assert evaluate(CHANGE_SECONDS, given | endless) == pytest.approx(latency(given, 8))


def test_every_rank_more_costs_latency() -> None:
    """Of every collective: an all_to_all too sends to each."""
    for kind in Collective:
        one = values(tokens=0, group=2) | dict.fromkeys(formulas.COUNT.values(), 0)
        times = [
            evaluate(formulas.COLLECTIVES_SECONDS, one | {formulas.COUNT[kind]: 1, GROUP: k})
            for k in (2, 4, 8)
        ]
        assert times[0] < times[1] < times[2], kind


def test_large_messages_take_the_other_protocol() -> None:
    """Small ones start sooner, large ones run faster; the faster of the two is taken."""
    at = "within_node", Collective.ALL_GATHER
    given = values(group=8) | dict.fromkeys(formulas.COUNT.values(), 0)
    given |= dict.fromkeys(formulas.WIDTH.values(), 0)
    given |= {formulas.COUNT[at[1]]: 1, formulas.WIDTH[at[1]]: 16384}

    def seconds(tokens: int, base: Any, peer: Any, link: Any) -> float:
        sent = tokens * 16384 * 7
        return float(given[base[at]] + 7 * given[peer[at]] + sent / given[link[at]])

    small = formulas.SMALL_BASE_SECONDS, formulas.SMALL_PEER_SECONDS, formulas.SMALL_BANDWIDTH
    large = formulas.BASE_SECONDS, formulas.PEER_SECONDS, formulas.LINK_BANDWIDTH
    for tokens, faster, slower in ((1, small, large), (1000, large, small)):
        found = evaluate(formulas.COLLECTIVES_SECONDS, given | {TOKENS: tokens})
        assert found == pytest.approx(seconds(tokens, *faster))
        assert found < seconds(tokens, *slower)


def test_what_is_reached_of_the_bandwidth_grows_with_a_matmul() -> None:
    """A matmul of 16 MB reaches less of it than one of gigabytes."""
    given = values(tokens=1, group=1)
    reached = []
    for mebibytes in (1, 16, 2048):
        elements = mebibytes * 2**19
        seconds = evaluate(WHOLE_SECONDS, given | {formulas.ELEMENTS: elements})
        reached.append(2 * elements / seconds / given[MEMORY_BANDWIDTH])
    assert reached == sorted(reached)
    assert reached[0] < 0.2
    assert 0.5 < reached[1] < 0.7
    assert reached[2] > 0.99


def test_many_tokens_are_bound_by_compute_and_gain_nothing() -> None:
    """A rank computes as much as before: 1/k of the weights for k times the tokens."""
    given = values(tokens=100_000, group=8)
    collectives = evaluate(formulas.COLLECTIVES_SECONDS, given)
    assert evaluate(CHANGE_SECONDS, given) == pytest.approx(collectives)
    assert collectives > 0


def test_a_lookup_reads_its_rows_only() -> None:
    lookup = {formulas.MATMULS: 0, formulas.ELEMENTS: 0, formulas.ROW_BYTES: 14336}
    given = values(tokens=24, group=8) | lookup
    assert evaluate(WHOLE_SECONDS, given) == pytest.approx(24 * 14336 / given[MEMORY_BANDWIDTH])
    assert evaluate(CHANGE_SECONDS, given) > 0


# units ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("expression", [WHOLE_SECONDS, SHARDED_SECONDS, CHANGE_SECONDS])
def test_seconds_scale_as_seconds(expression: sympy.Expr) -> None:
    """A clock that runs c times slower: rates fall by c, latencies rise by c, and so do times."""
    given, slower = values(tokens=24, group=8), 7.0
    scaled = dict(given)
    links = (formulas.LINK_BANDWIDTH, formulas.SMALL_BANDWIDTH, formulas.PEER_BANDWIDTH)
    latencies = (
        *(formulas.BASE_SECONDS, formulas.PEER_SECONDS),
        *(formulas.SMALL_BASE_SECONDS, formulas.SMALL_PEER_SECONDS),
    )
    rates = (MEMORY_BANDWIDTH, formulas.MATMUL_RATE, *(s for one in links for s in one.values()))
    for symbol in rates:
        scaled[symbol] = given[symbol] / slower
    for symbol in (formulas.MATMUL_SECONDS, *(s for one in latencies for s in one.values())):
        scaled[symbol] = given[symbol] * slower
    assert evaluate(expression, scaled) == pytest.approx(slower * evaluate(expression, given))


def test_moved_bytes_are_the_algebras() -> None:
    stage = StageShape((Cut.OUT,), 16384, 16384, 16384)
    path = min(legal_paths([stage], 8), key=by_messages)
    moved = evaluate(MOVED_BYTES, values(tokens=24, group=8))
    assert moved == pytest.approx(24 * path.bytes_per_token)


@pytest.mark.parametrize("name", list(profiles()))
def test_every_profile_prices_every_symbol(name: str) -> None:
    assert math.isfinite(evaluate(CHANGE_SECONDS, values(name, tokens=8, group=8)))
    assert math.isfinite(evaluate(CHANGE_SECONDS, values(name, tokens=8, group=16)))


def test_groups_that_leave_a_node_run_at_the_networks_pace() -> None:
    def collectives(**given: float) -> float:
        return evaluate(formulas.COLLECTIVES_SECONDS, values(tokens=24, **given))

    inside = collectives(group=8, ranks_per_node=8)
    assert collectives(group=8, ranks_per_node=4) > inside
    assert collectives(group=4, ranks_per_node=6) > collectives(group=4, ranks_per_node=8)


def test_a_mesh_sends_to_few_peers_at_their_links_pace() -> None:
    given = values("ascend-910b-a2", tokens=1e6, group=2)
    sent = evaluate(MOVED_BYTES, given)
    seconds = evaluate(formulas.COLLECTIVES_SECONDS, given)
    assert seconds == pytest.approx(sent / 22.4e9, rel=1e-3)


# monotonicity and crossovers --------------------------------------------------------------------

HARDWARE = st.sampled_from(list(profiles()))


@settings(max_examples=40)
@given(HARDWARE, st.sampled_from([2, 4, 8]), st.integers(0, 3000), st.integers(1, 3000))
def test_more_tokens_never_make_sharding_better(
    hardware: str, group: int, tokens: int, more: int
) -> None:
    change = [
        evaluate(CHANGE_SECONDS, values(hardware, tokens=t, group=group))
        for t in (tokens, tokens + more)
    ]
    assert change[1] >= change[0] - 1e-12


@settings(max_examples=40)
@given(HARDWARE, st.integers(0, 200), st.floats(1.1, 10))
def test_faster_memory_makes_sharding_worse(hardware: str, tokens: int, factor: float) -> None:
    given = values(hardware, tokens=tokens, group=8)
    faster = given | {MEMORY_BANDWIDTH: given[MEMORY_BANDWIDTH] * factor}
    assert evaluate(CHANGE_SECONDS, faster) >= evaluate(CHANGE_SECONDS, given) - 1e-12


@settings(max_examples=60)
@given(
    HARDWARE,
    st.sampled_from([2, 4, 8, 16]),
    st.floats(0, 1),
    st.integers(10_000, 10**9),
    st.floats(0, 1e-3),
)
def test_the_crossover_is_where_the_sign_changes(
    hardware: str, group: int, overlap: float, elements: int, latency: float
) -> None:
    given = values(hardware, group=group) | {
        formulas.OVERLAP: overlap,
        formulas.ELEMENTS: elements,
        formulas.BASE_SECONDS["within_node", Collective.ALL_GATHER]: latency,
        formulas.SMALL_BASE_SECONDS["within_node", Collective.ALL_GATHER]: latency,
    }

    def change(tokens: int) -> float:
        return evaluate(CHANGE_SECONDS, given | {TOKENS: tokens})

    last = last_paying(change)
    assert last is not None  # bytes always cost something in the end
    assert last == 0 or change(last) < 0
    assert change(last + 1) >= 0


def test_sharding_that_always_pays_has_no_crossover() -> None:
    assert last_paying(lambda tokens: -1.0) is None
    assert last_paying(lambda tokens: 1.0) == 0
    assert last_paying(lambda tokens: tokens - 5.5) == 5

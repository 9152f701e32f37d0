"""The placement algebra by itself: an interpreter over numpy says what each path computes."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from marks import quick

from fgtp_pass.algebra.path import Apply, Move, Path, StageShape, legal_paths, sent_bytes
from fgtp_pass.algebra.placement import Collective, Cut, Placement
from fgtp_pass.algebra.price import by_messages

pytestmark = quick

Array = np.ndarray
OWN, ALL, CUT, SUM = Placement.OWN, Placement.ALL, Placement.CUT, Placement.SUM
BOTH = (Cut.IN, Cut.OUT)


def width(features: int, k: int) -> int:
    return -(-features // k)


def part(x: Array, rank: int, k: int, axis: int) -> Array:
    """The rank's part of a dim, padded with zeros to the others' width."""
    w = width(x.shape[axis], k)
    mine = x.take(range(min(rank * w, x.shape[axis]), min((rank + 1) * w, x.shape[axis])), axis)
    padding = [(0, w - mine.shape[axis] if a == axis else 0) for a in range(x.ndim)]
    return np.pad(mine, padding)


class Interpreter:
    """Runs a path on every rank of a group, from what each rank holds and what it is sent."""

    def __init__(self, weights: Sequence[Array], own: Sequence[Array], residuals: Sequence[Array]):
        self.weights, self.k = weights, len(own)
        self.residuals = residuals
        self.rows = own[0].shape[0]
        self.held = list(own)
        self.sent = 0.0

    def start(self, placement: Placement) -> None:
        if placement is ALL:
            self.held = [np.concatenate(self.held)] * self.k

    def run(self, path: Path) -> list[Array]:
        self.start(path.start)
        features = self.held[0].shape[1]
        for step in path.steps:
            if isinstance(step, Apply):
                self.held = [self.apply(step, r, x) for r, x in enumerate(self.held)]
                features = self.weights[step.stage].shape[1]
            else:
                self.held = self.move(step, features)
        return self.held

    def apply(self, step: Apply, rank: int, x: Array) -> Array:
        weight = self.weights[step.stage]
        if step.cut is None:
            return x @ weight
        return x @ part(weight, rank, self.k, 0 if step.cut is Cut.IN else 1)

    def move(self, move: Move, features: int) -> list[Array]:
        held, k, n = self.held, self.k, self.rows
        rows = [slice(r * n, (r + 1) * n) for r in range(k)]
        match move.source, move.target:
            case Placement.OWN, Placement.ALL:
                return [np.concatenate(held)] * k
            case Placement.OWN, Placement.CUT:
                every = np.concatenate(held)
                return [part(every, r, k, 1) for r in range(k)]
            case Placement.ALL, Placement.OWN:
                return [held[r][rows[r]] for r in range(k)]
            case Placement.ALL, Placement.CUT:
                return [part(held[r], r, k, 1) for r in range(k)]
            case Placement.CUT, Placement.OWN:
                whole = np.concatenate(held, 1)[:, :features]
                return [whole[rows[r]] for r in range(k)]
            case Placement.CUT, Placement.ALL:
                return [np.concatenate(held, 1)[:, :features]] * k
            case Placement.SUM, Placement.OWN:
                return [sum(held)[rows[r]] for r in range(k)]
            case Placement.SUM, Placement.ALL:
                if move.carries:
                    for r in range(k):
                        held[r] = held[r].copy()
                        held[r][rows[r]] += self.residuals[r]
                return [sum(held)] * k
        raise AssertionError(move)


chains = st.integers(1, 3).flatmap(
    lambda stages: st.tuples(
        st.lists(st.integers(1, 7), min_size=stages + 1, max_size=stages + 1),
        st.lists(st.sampled_from([BOTH, BOTH[:1], BOTH[1:]]), min_size=stages, max_size=stages),
        st.integers(2, 4),
        st.sampled_from([OWN, ALL]),
        st.sampled_from([OWN, ALL]),
        st.booleans(),
    )
)


@given(chains)
@settings(max_examples=150, deadline=None)
def test_every_legal_path_computes_the_same(
    chain: tuple[list[int], list[tuple[Cut, ...]], int, Placement, Placement, bool],
) -> None:
    widths, cuts, k, start, end, gathers = chain
    source = np.random.default_rng(0)
    weights = [source.normal(size=(a, b)) for a, b in pairwise(widths)]
    own = [source.normal(size=(2, widths[0])) for _ in range(k)]
    residuals = [source.normal(size=(2, widths[-1])) for _ in range(k)]
    shapes = [
        StageShape(allowed, 8 * a, 8 * b, 8 * b, 8 * a * b if gathers else None)
        for a, b, allowed in zip(widths, widths[1:], cuts, strict=False)
    ]
    whole = [x @ np.linalg.multi_dot([*weights, np.eye(widths[-1])]) for x in own]
    for path in legal_paths(shapes, k, start, end, 8 * widths[-1] if end is ALL else None):
        got = Interpreter(weights, own, residuals).run(path)
        added = end is ALL and isinstance(path.steps[-1], Move) and path.steps[-1].source is SUM
        expected = [w + r if added else w for w, r in zip(whole, residuals, strict=True)]
        for rank in range(k):
            wanted = np.concatenate(expected) if end is ALL else expected[rank]
            np.testing.assert_allclose(got[rank], wanted, atol=1e-9, err_msg=str(path))


def test_a_broken_move_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The property above can fail: a rank that gets nothing of what it is sent is noticed."""
    stage = StageShape(BOTH, 8, 8, 8)
    weights = [np.eye(4)[::-1]]
    own = [np.arange(8.0).reshape(2, 4) + 10 * r for r in range(2)]
    for path in legal_paths([stage], 2):
        right = list(Interpreter(weights, own, own).run(path))
        interpreter = Interpreter(weights, own, own)
        with monkeypatch.context() as patch:
            stock = interpreter.move

            def broken(move: Move, features: int, stock: Any = stock) -> list[Array]:
                moved = stock(move, features)
                return [0 * moved[0], *moved[1:]] if move.collective else moved

            patch.setattr(interpreter, "move", broken)
            wrong = interpreter.run(path)
        assert not np.allclose(right[0], wrong[0]), str(path)


def test_paths_print_as_one_line_of_the_algebra() -> None:
    stage = StageShape(BOTH, 8, 8, 16, 64)
    texts = {str(path) for path in legal_paths([stage], 2)}
    assert texts == {
        "Own -all_gather-> All x W[out/k] -> Cut -all_to_all-> Own",
        "Own -all_gather-> All x W[out/k] -> Cut -all_gather-> All -slice-> Own",
        "Own -all_gather-> All -slice-> Cut x W[in/k] -> Sum -reduce_scatter-> Own",
        "Own -all_gather-> All -slice-> Cut x W[in/k] -> Sum -all_reduce-> All -slice-> Own",
        "Own -all_to_all-> Cut x W[in/k] -> Sum -reduce_scatter-> Own",
        "Own -all_to_all-> Cut x W[in/k] -> Sum -all_reduce-> All -slice-> Own",
        "Own x (W/k -all_gather-> W) -> Own",
    }
    joined = {str(p) for p in legal_paths([stage], 2, end=ALL, residual_bytes=8)}
    assert "Own -all_to_all-> Cut x W[in/k] -> Sum + residual -all_reduce-> All" in joined
    assert "Own -all_gather-> All x W[out/k] -> Cut + residual -all_gather-> All" in joined


def test_bytes_are_counted_along_the_path() -> None:
    """Half precision is added in fp32; a residual in the same message is paid, one in a sum not."""
    k, stage = 4, StageShape(BOTH, 2 * 10, 2 * 6, 4 * 6, 2 * 60)
    by_text = {str(p): p for p in legal_paths([stage], k, end=ALL, residual_bytes=2 * 6)}
    summed = by_text["Own -all_to_all-> Cut x W[in/k] -> Sum + residual -all_reduce-> All"]
    assert summed.widths == (20, 24)
    assert summed.bytes_per_token == 20 * 3 / 4 + 2 * 24 * 3
    gathered = by_text["Own -all_gather-> All x W[out/k] -> Cut + residual -all_gather-> All"]
    assert gathered.widths == (20, 12 + 12)
    assert gathered.bytes_per_token == 20 * 3 + 24 * 3
    whole = next(path for path in legal_paths([stage], k) if path.gathers)
    assert (whole.widths, whole.bytes_per_token, whole.gathered_bytes) == ((), 0.0, 120)


def test_fewest_messages_then_fewest_bytes() -> None:
    wide = StageShape(BOTH, 80, 8, 8)
    narrow = StageShape(BOTH, 8, 80, 80)
    best = [min(legal_paths([stage], 4), key=by_messages) for stage in (wide, narrow)]
    assert [path.cuts for path in best] == [(Cut.IN,), (Cut.OUT,)]
    assert [len(path.collectives) for path in best] == [2, 2]


@pytest.mark.parametrize("kind", list(Collective))
def test_a_group_of_one_sends_nothing(kind: Collective) -> None:
    assert sent_bytes(kind, 100, 1) == 0

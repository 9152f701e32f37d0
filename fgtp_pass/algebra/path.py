"""Paths through the placement algebra: every legal one, and what each sends."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from fgtp_pass.algebra.placement import APPLY, MOVES, Collective, Cut, Placement


@dataclass(frozen=True)
class StageShape:
    """One application of weights on a path.

    cuts: the ways in which its weights may be cut. in_bytes, out_bytes: of one token's features
    before and after. sum_bytes: of one token's partial sums as an all_reduce adds them (half
    precision is added in fp32). weight_bytes: of its `weights` weights, if these may be gathered
    for a step.
    """

    cuts: tuple[Cut, ...]
    in_bytes: int
    out_bytes: int
    sum_bytes: int
    weight_bytes: int | None = None
    weights: int = 0


RESIDUAL = "residual"


@dataclass(frozen=True)
class Move:
    """What takes an activation from one placement to another: a collective, or a free slice.

    carries: what comes along: the `RESIDUAL` of the own tokens, added to the own rows of a sum or
    in the same message; or the sums of another component, added before.
    """

    source: Placement
    target: Placement
    carries: tuple[str, ...] = ()

    @property
    def collective(self) -> Collective | None:
        return MOVES[self.source, self.target]

    def __str__(self) -> str:
        by = self.collective.value if self.collective is not None else "slice"
        return "".join(f" + {name}" for name in self.carries) + f" -{by}-> {self.target.value}"


@dataclass(frozen=True)
class Apply:
    """The weights of stage number `stage` applied to the activation.

    cut: along which dim they are cut; None where they are gathered whole before.
    """

    stage: int
    cut: Cut | None

    @property
    def gives(self) -> Placement:
        return APPLY[self.cut][1] if self.cut is not None else Placement.OWN

    def __str__(self) -> str:
        weight = f"W[{self.cut.value}/k]" if self.cut is not None else "(W/k -all_gather-> W)"
        return f" x {weight} -> {self.gives.value}"


PathStep = Move | Apply


@dataclass(frozen=True)
class Path:
    """A legal way through the algebra from one placement to another, with what it sends.

    widths: bytes per token of the whole activation that each collective moves, in order.
    bytes_per_token: bytes that one rank sends for each of its own tokens. gathered_bytes: of the
    `gathered` weights that it gathers whole, once per step whatever the tokens.
    """

    start: Placement
    steps: tuple[PathStep, ...]
    widths: tuple[int, ...]
    bytes_per_token: float
    gathered_bytes: int = 0
    gathered: int = 0

    @property
    def end(self) -> Placement:
        last = self.steps[-1]
        return last.target if isinstance(last, Move) else last.gives

    @property
    def collectives(self) -> tuple[Collective, ...]:
        """Those that move the activation, in order."""
        moves = (step for step in self.steps if isinstance(step, Move))
        return tuple(move.collective for move in moves if move.collective is not None)

    @property
    def applied(self) -> tuple[Cut | None, ...]:
        """By stage, how its weights are cut when they are applied; None for gathered ones."""
        return tuple(step.cut for step in self.steps if isinstance(step, Apply))

    @property
    def gathers(self) -> bool:
        """Whether weights are gathered in place of tokens."""
        return None in self.applied

    @property
    def cuts(self) -> tuple[Cut, ...]:
        """How the weights of each stage are cut, on a path that gathers none."""
        return tuple(cut for cut in self.applied if cut is not None)

    def carrying(self, component: str) -> "Path":
        """The same path with the sums of another component added before its last collective."""
        last = max(i for i, s in enumerate(self.steps) if isinstance(s, Move) and s.collective)
        move = self.steps[last]
        assert isinstance(move, Move)
        joined = replace(move, carries=(component, *move.carries))
        return replace(self, steps=(*self.steps[:last], joined, *self.steps[last + 1 :]))

    def __str__(self) -> str:
        return self.start.value + "".join(map(str, self.steps))


def sent_bytes(collective: Collective, width_bytes: Any, group_size: Any) -> Any:
    """Bytes that one rank sends per own token, for `width_bytes` bytes of features per token.

    Numbers in, a number out; sympy expressions in, an expression out.

    Bandwidth-optimal counts (Thakur, Rabenseifner and Gropp, "Optimization of Collective
    Communication Operations in MPICH", 2005): all_gather and reduce_scatter send (k-1) times the
    rank's own share, all_to_all sends (k-1)/k of it, and all_reduce is a reduce_scatter and an
    all_gather in one.
    """
    others = group_size - 1
    if collective is Collective.ALL_TO_ALL:
        return width_bytes * others / group_size
    if collective is Collective.ALL_REDUCE:
        return 2 * width_bytes * others
    return width_bytes * others


def legal_paths(
    stages: Sequence[StageShape],
    group_size: int,
    start: Placement = Placement.OWN,
    end: Placement = Placement.OWN,
    residual_bytes: int | None = None,
) -> tuple[Path, ...]:
    """Every way from `start` through all stages to `end`, none that moves in a circle.

    residual_bytes: of one token of the residual that the last move is to carry, if any.
    """
    return _legal_paths(tuple(stages), group_size, start, end, residual_bytes)


@lru_cache(maxsize=4096)  # a model's layers are alike, and each is looked at for many token counts
def _legal_paths(
    stages: tuple[StageShape, ...],
    group_size: int,
    start: Placement,
    end: Placement,
    residual_bytes: int | None,
) -> tuple[Path, ...]:
    return tuple(
        _priced(stages, group_size, start, steps, residual_bytes)
        for steps in _ways_through(stages, 0, start, end)
    )


def _ways_through(
    stages: Sequence[StageShape], number: int, here: Placement, end: Placement
) -> Iterator[tuple[PathStep, ...]]:
    if number == len(stages):
        # own tokens at the end are for the next site to gather
        if here is not Placement.OWN or end is Placement.OWN:
            yield from moves_between(here, end)
        return
    for cut in stages[number].cuts:
        needs, gives = APPLY[cut]
        for moves in moves_between(here, needs):
            for rest in _ways_through(stages, number + 1, gives, end):
                yield (*moves, Apply(number, cut), *rest)
    if here is Placement.OWN and stages[number].weight_bytes is not None:
        for rest in _ways_through(stages, number + 1, here, end):
            yield (Apply(number, None), *rest)


def moves_between(here: Placement, there: Placement) -> list[tuple[Move, ...]]:
    """No move where nothing is to be moved; else one move, or one and a free slice behind it."""
    if here is there:
        return [()]
    ways: list[tuple[Move, ...]] = [(Move(here, there),)] if (here, there) in MOVES else []
    for (source, middle), collective in MOVES.items():
        if source is here and collective is not None and MOVES.get((middle, there), here) is None:
            ways.append((Move(here, middle), Move(middle, there)))
    return ways


def _priced(
    stages: Sequence[StageShape],
    group_size: int,
    start: Placement,
    steps: tuple[PathStep, ...],
    residual_bytes: int | None,
) -> Path:
    widths: list[int] = []
    gathered, messages, sent = 0, 0, 0.0
    done = 0  # stages applied so far
    last = max((i for i, step in enumerate(steps) if isinstance(step, Move)), default=-1)
    marked = list(steps)
    for position, step in enumerate(steps):
        if isinstance(step, Apply):
            done = step.stage + 1
            if step.cut is None:
                gathered += stages[step.stage].weight_bytes or 0
                messages += stages[step.stage].weights
            continue
        carries = residual_bytes is not None and position == last and done == len(stages)
        if carries:
            marked[position] = replace(step, carries=(RESIDUAL,))
        if step.collective is None:
            continue
        width = stages[done].in_bytes if done < len(stages) else stages[-1].out_bytes
        if step.collective is Collective.ALL_REDUCE:
            width = stages[done - 1].sum_bytes
        elif carries:
            width += residual_bytes or 0
        widths.append(width)
        sent += float(sent_bytes(step.collective, width, group_size))
    return Path(start, tuple(marked), tuple(widths), sent, gathered, messages)

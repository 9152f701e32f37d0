"""The placement algebra: every lowering of every component is one path through it.

A tensor on a group of k ranks has a placement, and fine-grained tensor parallelism is the choice
of placements. Moving between two placements is a collective on dim 0; applying a cut weight takes
one placement to another. `cheapest_path` prices the legal paths and picks one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import product
from typing import Any


class Placement(Enum):
    """Where the tokens (dim 0) and the features (last dim) of an activation are in its group."""

    OWN = "Own"  # each rank holds its own tokens: the state before and after every site
    ALL = "All"  # every rank holds the tokens of the whole group
    CUT = "Cut"  # all tokens, the features cut in k
    SUM = "Sum"  # all tokens, partial sums that are still to be added


class Collective(Enum):
    """The collectives that move an activation between placements."""

    ALL_GATHER = "all_gather"
    ALL_TO_ALL = "all_to_all"
    REDUCE_SCATTER = "reduce_scatter"


class Cut(Enum):
    """Which dim of a weight is cut over the group: its inputs, its outputs, or its table rows."""

    IN = "in"
    OUT = "out"
    ROWS = "rows"


MOVES: dict[tuple[Placement, Placement], Collective] = {
    (Placement.OWN, Placement.ALL): Collective.ALL_GATHER,
    (Placement.OWN, Placement.CUT): Collective.ALL_TO_ALL,
    (Placement.CUT, Placement.OWN): Collective.ALL_TO_ALL,
    (Placement.SUM, Placement.OWN): Collective.REDUCE_SCATTER,
}

# activation placement that a cut weight takes -> placement that it gives
APPLY: dict[Cut, tuple[Placement, Placement]] = {
    Cut.OUT: (Placement.ALL, Placement.CUT),
    Cut.IN: (Placement.CUT, Placement.SUM),
    Cut.ROWS: (Placement.ALL, Placement.SUM),
}


@dataclass(frozen=True)
class StageShape:
    """One application of weights on a path: its possible cuts, its widths in bytes per token."""

    cuts: tuple[Cut, ...]
    in_bytes: int
    out_bytes: int


@dataclass(frozen=True)
class Move:
    """A collective that takes an activation from one placement to another."""

    source: Placement
    target: Placement

    @property
    def collective(self) -> Collective:
        return MOVES[self.source, self.target]


@dataclass(frozen=True)
class Apply:
    """The weights of stage number `stage`, cut along `cut`, applied to the activation."""

    stage: int
    cut: Cut


Step = Move | Apply


@dataclass(frozen=True)
class Path:
    """A legal way through the algebra from Own to Own, with its price.

    widths: bytes per token of the whole activation that each move moves, in order.
    bytes_per_token: bytes that one rank sends for each of its own tokens.
    """

    steps: tuple[Step, ...]
    widths: tuple[int, ...]
    bytes_per_token: float

    @property
    def collectives(self) -> tuple[Collective, ...]:
        return tuple(step.collective for step in self.steps if isinstance(step, Move))

    @property
    def cuts(self) -> tuple[Cut, ...]:
        return tuple(step.cut for step in self.steps if isinstance(step, Apply))

    def __str__(self) -> str:
        text = Placement.OWN.value
        for step in self.steps:
            if isinstance(step, Move):
                text += f" -{step.collective.value}-> {step.target.value}"
            else:
                text += f" x W[{step.cut.value}/k] -> {APPLY[step.cut][1].value}"
        return text


def sent_bytes(collective: Collective, width_bytes: Any, group_size: Any) -> Any:
    """Bytes that one rank sends per own token, for `width_bytes` bytes of features per token.

    Numbers in, a number out; sympy expressions in, an expression out.

    Bandwidth-optimal counts (Thakur, Rabenseifner and Gropp, "Optimization of Collective
    Communication Operations in MPICH", 2005): all_gather and reduce_scatter send (k-1) times the
    rank's own share, all_to_all sends (k-1)/k of it.
    """
    others = group_size - 1
    if collective is Collective.ALL_TO_ALL:
        return width_bytes * others / group_size
    return width_bytes * others


def cheapest_path(stages: Sequence[StageShape], group_size: int) -> Path:
    """The path through all stages that sends the fewest bytes, then the fewest messages.

    Between equals the one with the fewest partial sums wins: it rounds like the unsharded model.
    """
    paths = [
        path
        for cuts in product(*(stage.cuts for stage in stages))
        if (path := _path(stages, cuts, group_size)) is not None
    ]
    return min(
        paths,
        key=lambda path: (
            path.bytes_per_token,
            len(path.collectives),
            path.collectives.count(Collective.REDUCE_SCATTER),
        ),
    )


def _path(stages: Sequence[StageShape], cuts: Sequence[Cut], group_size: int) -> Path | None:
    """The path with the given cut per stage, or None where a needed move does not exist."""
    here = Placement.OWN
    steps: list[Step] = []
    widths: list[int] = []
    for number, (stage, cut) in enumerate(zip(stages, cuts, strict=True)):
        needs, gives = APPLY[cut]
        if here is not needs:
            if (here, needs) not in MOVES:
                return None
            steps.append(Move(here, needs))
            widths.append(stage.in_bytes)
        steps.append(Apply(number, cut))
        here = gives
    steps.append(Move(here, Placement.OWN))
    widths.append(stages[-1].out_bytes)
    moves = [step for step in steps if isinstance(step, Move)]
    price = sum(
        sent_bytes(move.collective, width, group_size)
        for move, width in zip(moves, widths, strict=True)
    )
    return Path(tuple(steps), tuple(widths), float(price))

"""Placements, the moves between them, and what a weight does to them."""

from enum import Enum


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
    ALL_REDUCE = "all_reduce"


class Cut(Enum):
    """Which dim of a weight is cut over the group: its inputs, its outputs, or its table rows."""

    IN = "in"
    OUT = "out"
    ROWS = "rows"


# None: a slice of what the rank holds already
MOVES: dict[tuple[Placement, Placement], Collective | None] = {
    (Placement.OWN, Placement.ALL): Collective.ALL_GATHER,
    (Placement.OWN, Placement.CUT): Collective.ALL_TO_ALL,
    (Placement.CUT, Placement.OWN): Collective.ALL_TO_ALL,
    (Placement.CUT, Placement.ALL): Collective.ALL_GATHER,  # of features
    (Placement.SUM, Placement.OWN): Collective.REDUCE_SCATTER,
    (Placement.SUM, Placement.ALL): Collective.ALL_REDUCE,
    (Placement.ALL, Placement.OWN): None,
    (Placement.ALL, Placement.CUT): None,
}


# activation placement that a cut weight takes -> placement that it gives; a whole weight, gathered
# for the step, keeps Own
APPLY: dict[Cut, tuple[Placement, Placement]] = {
    Cut.OUT: (Placement.ALL, Placement.CUT),
    Cut.IN: (Placement.CUT, Placement.SUM),
    Cut.ROWS: (Placement.ALL, Placement.SUM),
}

"""Which path each site takes at which number of tokens: decode moves tokens, prefill weights.

Sites that see the same number of tokens change their paths together, since those that touch do.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from fgtp_pass.detect.match import Match
from fgtp_pass.plan.path_choice import Choice

LARGEST = 1 << 17  # tokens per rank that are looked at; beyond, paths stay as they are there


@dataclass(frozen=True)
class Range:
    """The paths of sites that see one number of tokens, from `first` tokens per rank on."""

    first: int
    choice: Choice


def ranges_of(
    solve: Callable[[int], Choice], classes: Mapping[Match, object]
) -> dict[object, tuple[Range, ...]]:
    """By class of sites, its ranges in order; the first begins at no tokens.

    solve: the best choice for all sites at a number of tokens. classes: by site, what is equal for
    sites that always see the same number; only such sites are ever linked.
    """
    known: dict[int, Choice] = {}

    def at(tokens: int) -> Choice:
        if tokens not in known:
            known[tokens] = solve(tokens)
        return known[tokens]

    grid = [1 << power for power in range(LARGEST.bit_length())]
    found: dict[object, tuple[Range, ...]] = {}
    for of in dict.fromkeys(classes.values()):
        sites = {match for match, one in classes.items() if one == of}
        found[of] = _ranges_for(at, sites, grid)
    return found


def _ranges_for(
    at: Callable[[int], Choice], sites: set[Match], grid: Sequence[int]
) -> tuple[Range, ...]:
    def choice_at(tokens: int) -> Choice:
        return restricted(at(tokens), sites)

    ranges = [Range(0, choice_at(grid[0]))]
    for low, high in pairwise(grid):
        ranges += _changes(choice_at, low, high, ranges[-1].choice)
    return tuple(ranges)


def _changes(
    choice_at: Callable[[int], Choice], low: int, high: int, before: Choice
) -> Sequence[Range]:
    """The change between two numbers of tokens, if there is one: its first number by bisection."""
    after = choice_at(high)
    if same(before, after):
        return []
    while high - low > 1:
        middle = (low + high) // 2
        if same(choice_at(middle), before):
            low = middle
        else:
            high = middle
    return [Range(high, choice_at(high))]


def restricted(choice: Choice, sites: set[Match]) -> Choice:
    """The choice for some sites, with the links between them."""
    return Choice(
        {match: path for match, path in choice.paths.items() if match in sites},
        tuple(pair for pair in choice.beside if pair.first in sites),
        tuple(link for link in choice.behind if link.second in sites),
    )


def same(one: Choice, other: Choice) -> bool:
    return one.paths == other.paths and one.behind == other.behind and one.beside == other.beside

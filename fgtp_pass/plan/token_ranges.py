"""Which path each site takes at which number of tokens: decode moves tokens, prefill weights.

Components whose sites touch anywhere change their paths together, at the largest number of tokens
that any of them sees: they share stretches of tokens. So the ranges depend on the plan alone, and
what a rank runs on numbers that all ranks of a group know.
"""

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fgtp_pass.plan.path_choice import Choice

LARGEST = 1 << 17  # tokens per rank that are looked at; beyond, paths stay as they are there


@dataclass(frozen=True)
class Range:
    """The paths of some sites from `first` tokens per rank on."""

    first: int
    choice: Choice


# by components that change together
Ranges = Mapping[frozenset[str], tuple[Range, ...]]
Firsts = Mapping[frozenset[str], tuple[int, ...]]  # where each range begins


def ranges_of(solve: Callable[[int], Choice]) -> Ranges:
    """By components that change together, their ranges in order; the first begins at no tokens.

    solve: the best choice for all sites at a number of tokens.
    """
    known: dict[int, Choice] = {}

    def at(tokens: int) -> Choice:
        if tokens not in known:
            known[tokens] = solve(tokens)
        return known[tokens]

    grid = [1 << power for power in range(LARGEST.bit_length())]
    changes = [Range(0, at(grid[0]))]
    for high in grid[1:]:
        changes += _changes(at, high // 2, high)
    found: dict[frozenset[str], tuple[Range, ...]] = {}
    for components in _together([one.choice for one in changes]):
        ranges: list[Range] = []
        for one in changes:
            choice = one.choice.of(components)
            if not ranges or choice != ranges[-1].choice:
                ranges.append(Range(one.first, choice))
        found[components] = tuple(ranges)
    return found


def range_numbers(firsts: Firsts, tokens: Mapping[str, int]) -> tuple[int, ...]:
    """The number of the range that each is in. tokens: the most that a component sees, by name."""
    return tuple(
        bisect_right(begin, max(tokens[component] for component in components)) - 1
        for components, begin in firsts.items()
    )


def _changes(at: Callable[[int], Choice], low: int, high: int) -> list[Range]:
    """The changes above `low` and up to `high`, by bisection; none where both ends are equal."""
    if at(low) == at(high):
        return []
    if high - low == 1:
        return [Range(high, at(high))]
    middle = (low + high) // 2
    return [*_changes(at, low, middle), *_changes(at, middle, high)]


def _together(choices: Sequence[Choice]) -> list[frozenset[str]]:
    """The components, those apart that no choice lets share a stretch."""
    groups = [{match.component} for match in choices[0].paths]
    for link in (link for choice in choices for link in choice.links):
        first, second = (one.component for one in link.between)
        joined = [group for group in groups if first in group or second in group]
        groups = [group for group in groups if group not in joined] + [set().union(*joined)]
    return list(dict.fromkeys(map(frozenset, groups)))

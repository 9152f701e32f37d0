"""One graph along the paths for each number of tokens."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from fgtp_pass.plan.token_ranges import Firsts, range_numbers
from fgtp_pass.step.token_counts import RowGuards

Key = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Program:
    """The graph along one choice of paths.

    run: what was compiled. packed: the positions of the shards that it takes packed. collectives:
    what it runs, by name, in order. guards: what holds of the rows that it runs at. idle: the
    collectives alone, for a rank without tokens.
    """

    run: Callable[..., Any]
    packed: frozenset[int]
    collectives: tuple[str, ...]
    guards: RowGuards
    idle: fx.GraphModule


class Programs:
    """Those of one graph, each made when a step first needs it.

    firsts: of the plan, where ranges begin. make: makes one, not collectively.
    """

    def __init__(self, firsts: Firsts, make: Callable[[Key], Program]):
        self._firsts, self._make = firsts, make
        self.made: dict[Key, Program] = {}

    def key(self, largest: Mapping[str, int]) -> Key:
        """Which of them runs. largest: by component, the most tokens of any rank of the group."""
        return range_numbers(self._firsts, largest)

    def make(self, key: Key) -> None:
        self.made[key] = self._make(key)

"""A graph's token counts, computed from the sizes of its inputs."""

import functools
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
from torch import fx

from fgtp_pass.dynamo import SizeGuard
from fgtp_pass.errors import FgtpError
from fgtp_pass.graph.size_expression import size_inputs
from fgtp_pass.plan.planner import PlannedSite

_KEPT = 1024  # sizes of inputs whose counts are kept


@dataclass(frozen=True)
class TokenCounts:
    """The tokens that a rank brings to each site of a graph, and the most by component.

    number: stands for `sites`; ranks that differ in it differ at some site.
    """

    sites: tuple[int, ...]
    largest: tuple[int, ...]
    number: int


class TokenCounter:
    """Computes a graph's token counts from its inputs.

    components: those of its sites, in order; of_site: by site.
    """

    def __init__(self, graph: fx.Graph, sites: Sequence[PlannedSite]):
        self.of_site = tuple(site.site.component for site in sites)
        self.components = tuple(dict.fromkeys(self.of_site))
        where = size_inputs(graph)
        counts = [sympy.sympify(site.match.tokens) for site in sites]
        self._count = _Evaluator(counts, where, self._counts_of)

    def __call__(self, inputs: Sequence[Any]) -> TokenCounts:
        counts: TokenCounts = self._count(inputs)
        return counts

    def _counts_of(self, values: Sequence[sympy.Basic]) -> TokenCounts:
        sites = tuple(map(int, values))
        largest = tuple(
            max(n for n, of in zip(sites, self.of_site, strict=True) if of == component)
            for component in self.components
        )
        return TokenCounts(sites, largest, zlib.crc32(repr(sites).encode()))


class RowGuards:
    """What a compiled graph takes for granted about the rows it runs at (ragged)."""

    def __init__(self, graph: fx.Graph, guards: Sequence[SizeGuard]):
        """graph: that of Dynamo, whose inputs the rows follow."""
        row_symbols = {symbol: n for guard in guards for symbol, n in guard.numbers.items()}
        behind = len(graph.find_nodes(op="placeholder"))
        where = size_inputs(graph) | {s: (behind + n, 0) for s, n in row_symbols.items()}
        self._conditions = [guard.condition for guard in guards]
        self._broken = _Evaluator(self._conditions, where, self._first_broken)

    def broken(self, inputs: Sequence[Any]) -> sympy.Basic | None:
        """A condition that does not hold for the inputs of the rewritten graph, or None."""
        return self._broken(inputs)

    def _first_broken(self, held: Sequence[sympy.Basic]) -> sympy.Basic | None:
        found = zip(self._conditions, held, strict=True)
        return next((condition for condition, holds in found if not holds), None)


class _Evaluator:
    """Evaluates expressions in input sizes. `where`: (input, dim), or (input, None) for an int.

    By substitution, since each function that torch's symbolic shapes are made of evaluates itself.
    Steps of the same sizes take what the first of them found. result: makes it of the values.
    """

    def __init__(
        self,
        expressions: Sequence[sympy.Basic],
        where: Mapping[sympy.Symbol, tuple[int, int | None]],
        result: Callable[[list[sympy.Basic]], Any],
    ):
        symbols = sorted(set().union(*(e.free_symbols for e in expressions)), key=str)
        for symbol in symbols:
            if symbol not in where:
                raise FgtpError(
                    f"a number of tokens depends on {symbol}, which is no size of the graph's "
                    "inputs. Please report the model."
                )
        self._reads = [where[symbol] for symbol in symbols]

        @functools.lru_cache(_KEPT)
        def evaluate(*sizes: int) -> Any:
            values = dict(zip(symbols, map(sympy.Integer, sizes), strict=True))
            found = {e: e.xreplace(values) for e in dict.fromkeys(expressions)}
            return result([found[e] for e in expressions])

        self._evaluate = evaluate

    def __call__(self, inputs: Sequence[Any]) -> Any:
        sizes = (
            int(inputs[position] if dim is None else inputs[position].shape[dim])
            for position, dim in self._reads
        )
        return self._evaluate(*sizes)

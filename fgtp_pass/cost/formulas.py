"""The cost formulas: sympy expressions that the planner, "auto", the CLI and the page all evaluate.

A component is priced by sums over its sites (elements of its matmul weights, bytes of its table
rows, count and width of its collectives), because every formula is linear in these. The symbols
are listed below with their units; `fgtp_pass.cost.shape.ComponentShape.values` and
`fgtp_pass.cost.hardware.Hardware.values` give their numbers.

The matmul model is the roofline of Williams, Waterman and Patterson, "Roofline: an insightful
visual performance model", CACM 2009; the collective model is Hockney's latency and bandwidth (The
communication challenge for MPP, Parallel Computing 1994) with a latency that grows with the group,
as in NCCL's own tuner (src/graph/tuning.cc: base latency plus one hop per ring step).
"""

from collections.abc import Callable, Mapping
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal

import sympy
from sympy import Eq, Expr, Max, Min, Mod, Piecewise, Symbol

from fgtp_pass.algebra import Collective, sent_bytes


def _symbol(name: str, **assumed: bool) -> Symbol:
    return Symbol(name, nonnegative=True, **assumed)


# the workload
TOKENS = _symbol("tokens")  # tokens of one rank in one step
GROUP = Symbol("group", positive=True)  # ranks that share the component
RANKS_PER_NODE = Symbol("ranks_per_node", positive=True)

# the component, summed over its sites
ELEMENTS = _symbol("elements")  # elements of its matmul weights, unsharded
ELEMENT_BYTES = _symbol("element_bytes")  # bytes of one of them
ROW_BYTES = _symbol("row_bytes")  # bytes of a row of its lookup tables
COUNT = {kind: _symbol(f"{kind.value}_count") for kind in Collective}  # collectives in one step
WIDTH = {kind: _symbol(f"{kind.value}_width") for kind in Collective}  # bytes per token they move

# the device: bytes/s, FLOP/s, and the share of the shorter of two phases that the longer hides
MEMORY_BANDWIDTH = Symbol("memory_bandwidth", positive=True)
MATMUL_RATE = Symbol("matmul_rate", positive=True)
OVERLAP = _symbol("overlap")

# the links: seconds, seconds per further rank, bytes/s that one rank sends in all and to each other
LinkClass = Literal["within_node", "across_nodes"]
LINK_CLASSES: tuple[LinkClass, ...] = ("within_node", "across_nodes")
BASE_SECONDS = {(c, k): _symbol(f"{c}_{k.value}_base") for c in LINK_CLASSES for k in Collective}
PEER_SECONDS = {(c, k): _symbol(f"{c}_{k.value}_peer") for c in LINK_CLASSES for k in Collective}
LINK_BANDWIDTH = {
    (c, k): Symbol(f"{c}_{k.value}_bandwidth", positive=True)
    for c in LINK_CLASSES
    for k in Collective
}
PEER_BANDWIDTH = {
    (c, k): Symbol(f"{c}_{k.value}_peer_bandwidth", positive=True)
    for c in LINK_CLASSES
    for k in Collective
}


def matmul_seconds(rows: Expr, group: Expr) -> Expr:
    """Seconds of a component's matmuls with `rows` rows and weights cut in `group`.

    Reading 1/group of the weights takes m = elements * element_bytes / group / memory_bandwidth;
    the multiplications and additions, two per element and row, take
    c = 2 * elements / group * rows / matmul_rate. The longer phase hides `overlap` of the shorter:
    max(m, c) + (1 - overlap) * min(m, c), which is the roofline for overlap = 1 and a plain sum for
    0. Activations are not counted: a row is thousands of times smaller than a weight.
    """
    reading = ELEMENTS * ELEMENT_BYTES / (group * MEMORY_BANDWIDTH)
    computing = 2 * ELEMENTS * rows / (group * MATMUL_RATE)
    return Max(reading, computing) + (1 - OVERLAP) * Min(reading, computing)


def lookup_seconds(rows: Expr) -> Expr:
    """Seconds to read one table row per token: a lookup never reads its whole table."""
    return rows * ROW_BYTES / MEMORY_BANDWIDTH


def collectives_seconds() -> Expr:
    """Seconds of a component's collectives in one step; 0 for a group of one.

    Each takes a latency, base + peer * (group - 1), and the time to send its bytes, which the
    placement algebra counts (`fgtp_pass.algebra.sent_bytes`), over its bandwidth: the device's, or
    in a mesh without a switch that of its links to the others, if less. Groups are consecutive
    ranks, so all of them stay within a node if their size divides `ranks_per_node`; else the
    network sets the pace.
    They are not hidden behind compute: a site's matmul needs what its collective brings.
    """

    def linked(constants: Mapping[tuple[LinkClass, Collective], Symbol], kind: Collective) -> Expr:
        within, across = (constants[link, kind] for link in LINK_CLASSES)
        return Piecewise((within, Eq(Mod(RANKS_PER_NODE, GROUP), 0)), (across, True))

    total: Expr = sympy.Integer(0)
    for kind in Collective:
        latency = linked(BASE_SECONDS, kind) + linked(PEER_SECONDS, kind) * (GROUP - 1)
        mesh = linked(PEER_BANDWIDTH, kind) * (GROUP - 1)
        bandwidth = Min(linked(LINK_BANDWIDTH, kind), mesh)
        sending = TOKENS * sent_bytes(kind, WIDTH[kind], GROUP) / bandwidth
        total += COUNT[kind] * latency + sending
    return Piecewise((sympy.Integer(0), Eq(GROUP, 1)), (total, True))


# Seconds of a component in one step: whole on every rank, and cut over its group, where each rank
# sees the tokens of all but only its part of the weights.
WHOLE_SECONDS: Expr = matmul_seconds(TOKENS, sympy.Integer(1)) + lookup_seconds(TOKENS)
SHARDED_SECONDS: Expr = (
    matmul_seconds(GROUP * TOKENS, GROUP) + lookup_seconds(GROUP * TOKENS) + collectives_seconds()
)
CHANGE_SECONDS: Expr = SHARDED_SECONDS - WHOLE_SECONDS

# Bytes that a rank sends for a component in one step.
MOVED_BYTES: Expr = sympy.Add(
    *(TOKENS * sent_bytes(kind, WIDTH[kind], GROUP) for kind in Collective)
)


def pays_until(change: Expr) -> Expr:
    """The tokens per rank up to which `change` (seconds, in TOKENS alone) is negative.

    0 if sharding never pays, oo if it always does. `change` never falls as tokens grow: sharding
    saves reads, which are hidden once compute takes longer, and collectives only get longer. It is
    linear between the points where a Max or Min changes sides, so each piece is solved in closed
    form; the first root is the crossover.
    """
    bends = {
        root
        for bent in change.atoms(Max, Min)
        for root in sympy.solve(sympy.Add(bent.args[0], -bent.args[1]), TOKENS)
        if root.is_positive
    }
    if change.subs(TOKENS, 0) >= 0:
        return sympy.Integer(0)
    edges = [sympy.Integer(0), *sorted(bends), sympy.oo]
    for low, high in pairwise(edges):
        inside = (low + high) / 2 if high.is_finite else 2 * low + 1
        piece = change.replace(
            lambda e: isinstance(e, (Max, Min)), lambda e, at=inside: _side(e, at)
        )
        for root in sympy.solve(piece, TOKENS):
            if low <= root <= high:
                return root
    return sympy.oo


def _side(bent: Expr, tokens: Expr) -> Expr:
    """The argument that a Max or Min takes at a number of tokens."""
    best = max if isinstance(bent, Max) else min
    return best(bent.args, key=lambda argument: argument.subs(TOKENS, tokens))


def substitute(expression: Expr, values: Mapping[Symbol, Any]) -> Expr:
    """The expression with numbers for some of its symbols; many times faster than `subs`."""
    return expression.xreplace({symbol: sympy.sympify(v) for symbol, v in values.items()})


def evaluate(expression: Expr, values: Mapping[Symbol, Any]) -> float:
    """The number that an expression has for these values of all its symbols."""
    symbols, compiled = _compiled(expression)
    return float(compiled(*(values[symbol] for symbol in symbols)))


@lru_cache(maxsize=64)
def _compiled(expression: Expr) -> tuple[list[Symbol], Callable[..., float]]:
    """The expression as a Python function of its symbols, hundreds of times faster than itself."""
    symbols = sorted(expression.free_symbols, key=str)
    return symbols, sympy.lambdify(symbols, expression, "math")

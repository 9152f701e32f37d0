"""The cost formulas: sympy expressions that the planner, "auto", the CLI and the page all evaluate.

A component is priced by sums over its sites (count and elements of its matmul weights, bytes of its
table rows, count and width of its collectives), because every formula is linear in these. The
symbols are listed below with their units; `fgtp_pass.cost.shape.ComponentShape.values` and
`fgtp_pass.cost.hardware.Hardware.values` give their numbers. What a component is not part of
(attention, routed experts ...) is in `layout_formulas`.

The matmul model is the roofline of Williams, Waterman and Patterson, "Roofline: an insightful
visual performance model", CACM 2009, with a fixed time for each matmul; the collective model is
Hockney's latency and bandwidth (The communication challenge for MPP, Parallel Computing 1994) with
a latency that grows with the group, as in NCCL's own tuner (src/graph/tuning.cc: base latency plus
one hop per ring step), once for small messages and once for large ones.
"""

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, Literal

import sympy
from sympy import Eq, Expr, Max, Min, Mod, Piecewise, Symbol

from fgtp_pass.algebra.path import sent_bytes
from fgtp_pass.algebra.placement import Collective


def _symbol(name: str, **assumed: bool) -> Symbol:
    return Symbol(name, nonnegative=True, **assumed)


_ENDLESS = 2**40

# the workload
TOKENS = _symbol("tokens")  # tokens of one rank in one step
GROUP = Symbol("group", positive=True)  # ranks that share the component
RANKS_PER_NODE = Symbol("ranks_per_node", positive=True)

# the component, summed over its sites
MATMULS = _symbol("matmuls")  # matmuls in one step
MATRICES = _symbol("matrices")  # weights of these
ELEMENTS = _symbol("elements")  # elements of their weights, unsharded
ELEMENT_BYTES = _symbol("element_bytes")  # bytes of one of them
ROW_BYTES = _symbol("row_bytes")  # bytes of a row of its lookup tables
COUNT = {kind: _symbol(f"{kind.value}_count") for kind in Collective}  # collectives in one step
WIDTH = {kind: _symbol(f"{kind.value}_width") for kind in Collective}  # bytes per token they move

# the device: bytes/s, FLOP/s, the share of the shorter of two phases that the longer hides, and
# seconds that each matmul takes beside reading and computing
MEMORY_BANDWIDTH = Symbol("memory_bandwidth", positive=True)
MATMUL_RATE = Symbol("matmul_rate", positive=True)
OVERLAP = _symbol("overlap")
MATMUL_SECONDS = _symbol("matmul_seconds")

# the links: seconds, seconds per further rank, bytes/s that one rank sends in all, for large and
# for small messages; and bytes/s to each other rank
LinkClass = Literal["within_node", "across_nodes"]
LINK_CLASSES: tuple[LinkClass, ...] = ("within_node", "across_nodes")
_Constants = Mapping[tuple[LinkClass, Collective], Symbol]


def _constants(name: str, **assumed: bool) -> _Constants:
    return {
        (link, kind): Symbol(f"{link}_{kind.value}_{name}", **assumed)
        for link in LINK_CLASSES
        for kind in Collective
    }


BASE_SECONDS = _constants("base", nonnegative=True)
PEER_SECONDS = _constants("peer", nonnegative=True)
LINK_BANDWIDTH = _constants("bandwidth", positive=True)
SMALL_BASE_SECONDS = _constants("small_base", nonnegative=True)
SMALL_PEER_SECONDS = _constants("small_peer", nonnegative=True)
SMALL_BANDWIDTH = _constants("small_bandwidth", positive=True)
PEER_BANDWIDTH = _constants("peer_bandwidth", positive=True)


def roofline(reading: Expr, computing: Expr) -> Expr:
    """Seconds of two phases of which the longer hides `overlap` of the shorter.

    max(m, c) + (1 - overlap) * min(m, c), which is the roofline for overlap = 1 and a plain sum for
    0.
    """
    longer, shorter = (bent(reading, computing, evaluate=False) for bent in (Max, Min))
    return longer + (1 - OVERLAP) * shorter


def matmul_seconds(rows: Expr, group: Expr) -> Expr:
    """Seconds of a component's matmuls with `rows` rows and weights cut in `group`.

    Reading 1/group of the weights takes m = elements * element_bytes / group / memory_bandwidth;
    the multiplications and additions, two per element and row, take
    c = 2 * elements / group * rows / matmul_rate. The longer phase hides `overlap` of the shorter
    (`roofline`). Each matmul takes `matmul_seconds` besides, to start and to fill the device: so
    what is reached of the bandwidth depends on the bytes of one matmul, b / (b + matmul_seconds *
    memory_bandwidth), and a shard reaches less than a whole weight. Activations are not counted: a
    row is thousands of times smaller than a weight.
    """
    reading = ELEMENTS * ELEMENT_BYTES / (group * MEMORY_BANDWIDTH)
    computing = 2 * ELEMENTS * rows / (group * MATMUL_RATE)
    return MATMULS * MATMUL_SECONDS + roofline(reading, computing)


def lookup_seconds(rows: Expr) -> Expr:
    """Seconds to read one table row per token: a lookup never reads its whole table."""
    return rows * ROW_BYTES / MEMORY_BANDWIDTH


def collective_seconds(
    kind: Collective, count: Expr, sent: Expr, group: Expr, node: Expr = RANKS_PER_NODE
) -> Expr:
    """Seconds of `count` collectives of one kind that send `sent` bytes of a rank in all.

    Each takes a latency, base + peer * (group - 1), and the time to send its bytes over the link's
    bandwidth, in a mesh without a switch over that of the links to the others, if less. Libraries
    have a protocol for small messages, with a lower latency and a lower bandwidth, and one for
    large ones; they take the faster. Groups are consecutive ranks, so all of them stay within a
    node if their size divides its `node` ranks; else the network sets the pace.
    """

    def linked(constants: _Constants) -> Expr:
        within, across = (constants[link, kind] for link in LINK_CLASSES)
        return Piecewise((within, Eq(Mod(node, group), 0)), (across, True))

    def protocol(base: _Constants, peer: _Constants, link: _Constants) -> Expr:
        latency = linked(base) + linked(peer) * (group - 1)
        peers = linked(PEER_BANDWIDTH) * (group - 1)
        bandwidth = Min(linked(link), peers, evaluate=False)
        return count * latency + sent / bandwidth

    # evaluating takes sympy a second to find that it cannot say which is smaller
    return Min(
        protocol(SMALL_BASE_SECONDS, SMALL_PEER_SECONDS, SMALL_BANDWIDTH),
        protocol(BASE_SECONDS, PEER_SECONDS, LINK_BANDWIDTH),
        evaluate=False,
    )


def collectives_seconds() -> Expr:
    """Seconds of a component's collectives in one step; 0 for a group of one.

    The bytes of each are those that the placement algebra counts (`fgtp_pass.algebra.sent_bytes`).
    They are not hidden behind compute: a site's matmul needs what its collective brings.
    """
    total = sympy.Add(
        *(
            collective_seconds(
                kind, COUNT[kind], TOKENS * sent_bytes(kind, WIDTH[kind], GROUP), GROUP
            )
            for kind in Collective
        )
    )
    return Piecewise((sympy.Integer(0), Eq(GROUP, 1)), (total, True))


def gathering_seconds() -> Expr:
    """Seconds to gather a component's weights; 0 for a group of one.

    One all_gather for each weight, to which a rank brings its part of the weight. A step in which
    weights move in place of tokens takes this, and its matmuls are those of whole weights and own
    tokens. A gather is not taken to be hidden, though it runs beside the matmul before.
    """
    own_part = ELEMENTS * ELEMENT_BYTES / GROUP
    sent = sent_bytes(Collective.ALL_GATHER, own_part, GROUP)
    total = collective_seconds(Collective.ALL_GATHER, MATRICES, sent, GROUP)
    return Piecewise((sympy.Integer(0), Eq(GROUP, 1)), (total, True))


# Seconds of a component in one step: whole on every rank, and cut over its group, where each rank
# sees the tokens of all but only its part of the weights.
WHOLE_SECONDS: Expr = matmul_seconds(TOKENS, sympy.Integer(1)) + lookup_seconds(TOKENS)
COMPUTING_SECONDS: Expr = matmul_seconds(GROUP * TOKENS, GROUP) + lookup_seconds(GROUP * TOKENS)
COLLECTIVES_SECONDS: Expr = collectives_seconds()
GATHERING_SECONDS: Expr = gathering_seconds()
SHARDED_SECONDS: Expr = COMPUTING_SECONDS + COLLECTIVES_SECONDS
CHANGE_SECONDS: Expr = SHARDED_SECONDS - WHOLE_SECONDS

# Bytes that a rank sends for a component in one step.
MOVED_BYTES: Expr = sympy.Add(
    *(TOKENS * sent_bytes(kind, WIDTH[kind], GROUP) for kind in Collective)
)


def last_paying(change: Callable[[int], float]) -> int | None:
    """The last number of tokens per rank at which `change` (of seconds, by tokens) is a gain.

    0 if it never is, None if there is no end to it. `change` never falls as tokens grow: sharding
    saves reads, which are hidden once compute takes longer, and collectives only get longer. So the
    crossover is found by halving.
    """
    pays, loses = 0, 1
    while change(loses) < 0:
        pays, loses = loses, 2 * loses
        if loses > _ENDLESS:
            return None
    while loses - pays > 1:
        middle = (pays + loses) // 2
        pays, loses = (middle, loses) if change(middle) < 0 else (pays, middle)
    return pays


def evaluate(expression: Expr, values: Mapping[Symbol, Any]) -> float:
    """The number that an expression has for these values of all its symbols."""
    symbols, compiled = _compiled(expression)
    return float(compiled(*(values[symbol] for symbol in symbols)))


@lru_cache(maxsize=64)
def _compiled(expression: Expr) -> tuple[list[Symbol], Callable[..., float]]:
    """The expression as a Python function of its symbols, hundreds of times faster than itself."""
    symbols = sorted(expression.free_symbols, key=str)
    return symbols, sympy.lambdify(symbols, expression, "math")

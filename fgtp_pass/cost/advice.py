"""Which sizes to take: what "auto" means, for the backend, vLLM and the command line alike."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from fgtp_pass.cost.estimate import Cluster
from fgtp_pass.cost.shape import ComponentShape
from fgtp_pass.plan import format_bytes
from fgtp_pass.sizes import config_error, divisors, unknown

Objective = Literal["latency", "memory", "balanced"]
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)


def read_objective(name: str) -> Objective:
    """The objective of this name. Raises ConfigError for a name that is none, with the nearest."""
    for objective in OBJECTIVES:
        if objective == name:
            return objective
    raise config_error(unknown("objective", name, OBJECTIVES, "--objective"))


@dataclass(frozen=True)
class Choice:
    """Chosen sizes, 1 for off, and for each component one sentence of reason."""

    sizes: Mapping[str, int]
    reasons: Mapping[str, str]


def choose_sizes(
    shapes: Mapping[str, ComponentShape], cluster: Cluster, tokens: int, objective: Objective
) -> Choice:
    """The sizes that the objective favours at `tokens` tokens per rank.

    latency: the size with the largest predicted gain; off where every size loses. balanced: the
    size that frees most memory without losing time; off where every size loses. memory: the size
    that frees most memory. Groups stay within a node. Components that share a tied weight get one
    size, for their sum.

    shapes: see `fgtp_pass.cost.shape.component_shapes`.
    """
    sizes: dict[str, int] = {}
    reasons: dict[str, str] = {}
    for together in _tied(shapes):
        names = " and ".join(together)
        candidates = [
            _candidate(together, shapes, cluster, size, tokens) for size in _sizes(cluster)
        ]
        chosen, reason = _choose(candidates, objective, tokens)
        for name in together:
            sizes[name] = chosen
            reasons[name] = reason if len(together) == 1 else f"{names} share a weight: {reason}"
    return Choice(sizes, reasons)


@dataclass(frozen=True)
class _Candidate:
    size: int
    seconds: float
    saved: float


def _sizes(cluster: Cluster) -> list[int]:
    """Sizes > 1 whose groups stay within a node."""
    within = min(cluster.ranks_per_node, cluster.data_parallel_size)
    return [k for k in divisors(cluster.data_parallel_size) if k > 1 and within % k == 0]


def _candidate(
    together: tuple[str, ...],
    shapes: Mapping[str, ComponentShape],
    cluster: Cluster,
    size: int,
    tokens: int,
) -> _Candidate:
    seconds = sum(cluster.change_seconds(shapes[name], size, tokens) for name in together)
    return _Candidate(size, seconds, sum(shapes[name].bytes_saved(size) for name in together))


def _choose(candidates: list[_Candidate], objective: Objective, tokens: int) -> tuple[int, str]:
    if not candidates:
        return 1, "no two ranks share a node"
    fastest = min(candidates, key=lambda c: c.seconds)
    gains = [c for c in candidates if c.seconds < 0]
    if objective == "memory":
        best = max(candidates, key=lambda c: (c.saved, -c.seconds))
    elif not gains:
        return 1, (
            f"every size loses time at {tokens} tokens per rank, {fastest.size} least "
            f"({_ms(fastest.seconds)} for {format_bytes(fastest.saved)})"
        )
    elif objective == "latency":
        best = fastest
    else:
        best = max(gains, key=lambda c: (c.saved, -c.seconds))
    why = {
        "latency": "the fastest size",
        "memory": "the size that frees most",
        "balanced": "frees most of the sizes that lose no time",
    }[objective]
    text = (
        f"{why}: {_ms(best.seconds)} at {tokens} tokens per rank, frees {format_bytes(best.saved)}"
    )
    return best.size, text


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:+.2f} ms"


def _tied(shapes: Mapping[str, ComponentShape]) -> list[tuple[str, ...]]:
    """The components in groups that share a weight; most are alone."""
    groups: list[tuple[set[str], list[str]]] = []
    for name, shape in shapes.items():
        mine = {weight.fqn for site in shape.sites for weight in site.weights}
        shared = next((group for group in groups if group[0] & mine), None)
        if shared is None:
            groups.append((mine, [name]))
        else:
            shared[0].update(mine)
            shared[1].append(name)
    return [tuple(names) for _, names in groups]

"""Which sizes to take: what "auto" means, for the backend, vLLM and the command line alike."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from fgtp_pass.cost.estimate import Cluster
from fgtp_pass.cost.shape import ComponentShape
from fgtp_pass.cost.uncertainty import Predicted
from fgtp_pass.hints import config_error, unknown
from fgtp_pass.plan.plan import format_bytes
from fgtp_pass.plan.sizes import divisors

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
    """Chosen sizes, 1 for off, and for each component one sentence of reason.

    enough: whether they free what had to be freed.
    """

    sizes: Mapping[str, int]
    reasons: Mapping[str, str]
    enough: bool = True


@dataclass(frozen=True)
class _Candidate:
    """One size for the components that share it: its change of time, and bytes freed per device."""

    size: int
    change: Predicted
    saved: float


_OFF = _Candidate(1, Predicted(0, 0, 0, {}), 0)


def choose_sizes(
    shapes: Mapping[str, ComponentShape],
    cluster: Cluster,
    tokens: int,
    objective: Objective,
    needed_bytes: float = 0,
) -> Choice:
    """The sizes that the objective favours at `tokens` tokens per rank.

    latency: the size with the largest predicted gain. balanced: the size that frees most memory
    without losing time. Both take only gains whose sign is the same all over the range of the
    prediction, and leave a component whole otherwise. memory: the size that frees most memory.
    If that frees less than `needed_bytes` on a device, the sizes that free enough at the smallest
    loss are taken instead, or where none do those that free most. Groups stay within a node.
    Components that share a tied weight get one size, for their sum.

    shapes: see `fgtp_pass.cost.shape.component_shapes`.
    """
    together = tied(shapes)
    options = {
        names: [_candidate(names, shapes, cluster, size, tokens) for size in group_sizes(cluster)]
        for names in together
    }
    chosen = {names: _choose(options[names], objective, tokens) for names in together}
    enough = True
    if sum(candidate.saved for candidate, _ in chosen.values()) < needed_bytes:
        forced = _smallest_loss([options[names] for names in together], needed_bytes)
        enough = sum(candidate.saved for candidate in forced) >= needed_bytes
        chosen = {
            names: chosen[names]
            if candidate is chosen[names][0]
            else (candidate, _why_forced(candidate, tokens, enough))
            for names, candidate in zip(together, forced, strict=True)
        }
    sizes: dict[str, int] = {}
    reasons: dict[str, str] = {}
    for names, (candidate, reason) in chosen.items():
        for name in names:
            sizes[name] = candidate.size
            shared = f"{' and '.join(names)} share a weight: "
            reasons[name] = reason if len(names) == 1 else shared + reason
    return Choice(sizes, reasons, enough)


def group_sizes(cluster: Cluster) -> list[int]:
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
    changes = [cluster.change_range(shapes[name], size, tokens) for name in together]
    # what is uncertain of one is uncertain of the other
    change = Predicted(
        sum(c.low for c in changes), sum(c.mid for c in changes), sum(c.high for c in changes), {}
    )
    saved = sum(shapes[name].bytes_saved(size) for name in together)
    return _Candidate(size, change, saved / cluster.tensor_parallel_size)


def _choose(
    candidates: Sequence[_Candidate], objective: Objective, tokens: int
) -> tuple[_Candidate, str]:
    if not candidates:
        return _OFF, "no two ranks share a node"
    fastest = min(candidates, key=lambda c: c.change.mid)
    gains = [c for c in candidates if c.change.high < 0]
    if objective == "memory":
        best = max(candidates, key=lambda c: (c.saved, -c.change.mid))
        return best, f"the size that frees most: {_said(best, tokens)}"
    if not gains and fastest.change.low < 0:
        return _OFF, f"too close to call, {fastest.size} is nearest: {_said(fastest, tokens)}"
    if not gains:
        return _OFF, f"every size loses time, {fastest.size} least: {_said(fastest, tokens)}"
    if objective == "latency":
        best = min(gains, key=lambda c: c.change.mid)
        return best, f"the fastest size: {_said(best, tokens)}"
    best = max(gains, key=lambda c: (c.saved, -c.change.mid))
    return best, f"frees most of the sizes that lose no time: {_said(best, tokens)}"


def _said(candidate: _Candidate, tokens: int) -> str:
    change = candidate.change
    return (
        f"{1e3 * change.mid:+.2f} ms ({1e3 * change.low:+.2f} to {1e3 * change.high:+.2f}) at "
        f"{tokens} tokens per rank, frees {format_bytes(candidate.saved)}"
    )


def _why_forced(candidate: _Candidate, tokens: int, enough: bool) -> str:
    if not enough:
        return f"frees most, and the model does not fit even so: {_said(candidate, tokens)}"
    if candidate.size == 1:
        return "the others free enough"
    return f"the smallest loss that fits: {_said(candidate, tokens)}"


def _smallest_loss(
    options: Sequence[Sequence[_Candidate]], needed_bytes: float
) -> tuple[_Candidate, ...]:
    """One candidate for each: the fastest that free enough together, or else those that free most.

    Sums are built up one group of components at a time; one that frees no more than a faster one is
    of no use, so few are left.
    """
    front: list[tuple[float, float, tuple[_Candidate, ...]]] = [(0, 0, ())]
    for candidates in options:
        sums = [
            (seconds + one.change.mid, saved + one.saved, (*taken, one))
            for seconds, saved, taken in front
            for one in (_OFF, *candidates)
        ]
        front = []
        for one in sorted(sums, key=lambda s: (s[0], -s[1])):
            if not front or one[1] > front[-1][1]:
                front.append(one)
    return next((one for one in front if one[1] >= needed_bytes), front[-1])[2]


def tied(shapes: Mapping[str, ComponentShape]) -> list[tuple[str, ...]]:
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

"""The plan: what is cut where, as frozen data that prints as a table and travels as JSON."""

import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

from fgtp_pass.algebra.path import Path


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def itemsize(dtype: str) -> int:
    """Bytes of one element of a torch dtype, by its name: plans are read without torch."""
    bits = re.search(r"\d+", dtype)
    return max(1, int(bits[0]) // 8) if bits else 1


class WeightCut(_Frozen):
    """How one parameter is cut.

    fqn: fully qualified name in the model. shape, dtype: of the full parameter. cut_dim: the dim
    that is cut, or None where the parameter stays whole (a bias that is added after the sum).
    blocks: the cut dim is that many equal blocks in a row, each cut by itself (a fused gate and up
    projection has 2), so that every rank gets its part of each.
    """

    fqn: str
    shape: tuple[int, ...]
    dtype: str
    cut_dim: int | None
    blocks: int = 1

    @property
    def nbytes(self) -> int:
        """Bytes of the full parameter."""
        return math.prod(self.shape) * itemsize(self.dtype)

    @property
    def dim(self) -> int:
        """The dim that is cut, of a parameter that is."""
        assert self.cut_dim is not None, f"{self.fqn} stays whole"
        return self.cut_dim

    def cuts_like(self, other: "WeightCut") -> bool:
        """Whether both cut a parameter the same way, whatever name Dynamo gave it."""
        return self == other.model_copy(update={"fqn": self.fqn})

    def block_width(self, group_size: int) -> int:
        """Width of a shard within one block: ceil(block / k); the last shard is padded to it."""
        return -(-(self.shape[self.dim] // self.blocks) // group_size)

    def shard_shape(self, group_size: int) -> tuple[int, ...]:
        """Shape of the shard on every rank."""
        if self.cut_dim is None:
            return self.shape
        shape = list(self.shape)
        shape[self.cut_dim] = self.blocks * self.block_width(group_size)
        return tuple(shape)

    def bytes_saved(self, group_size: int) -> int:
        """Bytes that cutting frees on each rank."""
        return self.nbytes - math.prod(self.shard_shape(group_size)) * itemsize(self.dtype)


class RangedPath(_Frozen):
    """The path that a site takes from a number of tokens per rank on.

    gathered_bytes: of the weights that it gathers whole, once per step; what it moves beside that
    is as in `Site`.
    """

    from_tokens: int
    path: str
    collectives: tuple[str, ...]
    widths: tuple[int, ...]
    bytes_per_token: float
    gathered_bytes: int


class Site(_Frozen):
    """One place in the graph that is rewritten.

    path: the lowering, a path through the placement algebra (see `fgtp_pass.algebra`).
    cuts: how the weights of each stage on that path are cut: "in", "out" or "rows" (a lookup).
    collectives: the collectives on that path, in order, once per step. widths: bytes per token of
    the whole activation that each of them moves.
    bytes_per_token: bytes that a rank sends per own token.
    ops: a digest of the ops that a rank runs on the tokens of others, so that ranks can tell that
    theirs are the same. ranges: its paths by number of tokens, where it takes more than one; the
    others are for decode.
    """

    component: str
    weights: tuple[WeightCut, ...]
    group_size: int
    path: str
    cuts: tuple[str, ...]
    collectives: tuple[str, ...]
    widths: tuple[int, ...]
    bytes_per_token: float
    ops: str = ""
    ranges: tuple[RangedPath, ...] = ()


class LeftAlone(_Frozen):
    """A parameter that stays whole on every rank, and why."""

    fqn: str
    reason: str


class ChosenSize(_Frozen):
    """A group size that "auto" took for a component, 1 for off, and why."""

    component: str
    size: int
    reason: str


class Plan(_Frozen):
    """Everything that the pass will do to a model, the same on every rank.

    data_parallel_size: number of ranks that the component groups are cut from. chosen: the sizes
    that the cost model chose, if it was asked to. paths_by: what the paths were compared by.
    """

    version: Literal[1] = 1
    data_parallel_size: int
    sites: tuple[Site, ...] = ()
    left_alone: tuple[LeftAlone, ...] = ()
    chosen: tuple[ChosenSize, ...] = ()
    paths_by: str = ""

    def cuts(self) -> dict[str, tuple[WeightCut, int]]:
        """The cut weights by name, each once, with its group size."""
        return {
            weight.fqn: (weight, site.group_size)
            for site in self.sites
            for weight in site.weights
            if weight.cut_dim is not None
        }

    @property
    def bytes_saved_per_rank(self) -> int:
        """Bytes of weights that every rank frees. A tied weight counts once."""
        return sum(weight.bytes_saved(size) for weight, size in self.cuts().values())

    @property
    def gathered_peak_bytes(self) -> int:
        """The most that weights gathered for a step with many tokens take on a rank, for that time.

        No more than two of them are there at once.
        """
        gathering = [s for s in self.sites if any(one.gathered_bytes for one in s.ranges)]
        return 2 * max((w.nbytes for s in gathering for w in s.weights), default=0)

    @property
    def collectives_per_step(self) -> int:
        """Collectives in one forward, without the token-count check."""
        return sum(len(site.collectives) for site in self.sites)

    @property
    def fingerprint(self) -> str:
        """Equal on two ranks exactly when their plans are equal."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:16]

    def with_prefix(self, prefix: str) -> "Plan":
        """The same plan for a model in which the planned module is the submodule `prefix`."""
        if not prefix:
            return self
        sites = (
            site.model_copy(
                update={
                    "weights": tuple(
                        w.model_copy(update={"fqn": prefix + w.fqn}) for w in site.weights
                    )
                }
            )
            for site in self.sites
        )
        left_alone = (
            left.model_copy(update={"fqn": prefix + left.fqn}) for left in self.left_alone
        )
        return self.model_copy(update={"sites": tuple(sites), "left_alone": tuple(left_alone)})

    def to_json(self) -> str:
        return self.model_dump_json(indent=2)

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Raises pydantic.ValidationError for anything that `to_json` does not write."""
        return cls.model_validate_json(text)

    def __str__(self) -> str:
        rows = [("component", "sites", "group", "path", "freed/rank", "collectives/step")]
        for component, size, path in dict.fromkeys(
            (s.component, s.group_size, s.path) for s in self.sites
        ):
            sites = [
                s
                for s in self.sites
                if (s.component, s.group_size, s.path) == (component, size, path)
            ]
            part = Plan(data_parallel_size=self.data_parallel_size, sites=tuple(sites))
            counts = Counter(c for s in sites for c in s.collectives)
            rows.append(
                (
                    component,
                    str(len(sites)),
                    str(size),
                    path,
                    format_bytes(part.bytes_saved_per_rank),
                    ", ".join(f"{n} {name}" for name, n in counts.items()),
                )
            )
        total = format_bytes(self.bytes_saved_per_rank)
        rows.append(("total", str(len(self.sites)), "", "", total, str(self.collectives_per_step)))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
        lines.insert(1, "  ".join("-" * w for w in widths))
        note = f"data-parallel size {self.data_parallel_size}, plan {self.fingerprint}"
        tied = [s.component for s in self.sites if self._is_tied(s)]
        if tied:
            note += f"; a tied weight serves {' and '.join(dict.fromkeys(tied))} and is freed once"
        chosen = [
            f"{c.component}: {c.size if c.size > 1 else 'off'}, {c.reason}" for c in self.chosen
        ]
        if self.paths_by:
            note += f"; paths by {self.paths_by}"
        return "\n".join([line.rstrip() for line in lines] + [note, *self._by_range(), *chosen])

    def _by_range(self) -> list[str]:
        """A line for each path that a component takes from some number of tokens on."""
        found = dict.fromkeys(
            f"{site.component} from {one.from_tokens} tokens per rank on: {one.path}"
            for site in self.sites
            for one in site.ranges
            if one.from_tokens
        )
        if self.gathered_peak_bytes:
            most = format_bytes(self.gathered_peak_bytes)
            found[f"a step that gathers weights takes up to {most} more for them"] = None
        return list(found)

    def _is_tied(self, site: Site) -> bool:
        mine = {w.fqn for w in site.weights if w.cut_dim is not None}
        return any(
            mine & {w.fqn for w in other.weights}
            for other in self.sites
            if other.component != site.component
        )


def merge(plans: Iterable[Plan]) -> Plan | None:
    """One plan for a model that Dynamo split into several graphs; None of none.

    The sites of the graph with the most weights come first; what any graph cuts is not left alone.
    """
    distinct = sorted(set(plans), key=lambda plan: (-len(plan.sites), plan.fingerprint))
    if not distinct:
        return None
    sites = {_site_key(site): site for plan in reversed(distinct) for site in reversed(plan.sites)}
    ordered = tuple(reversed(sites.values()))
    cut = {weight.fqn for site in ordered for weight in site.weights}
    rest = {left.fqn: left for plan in distinct for left in plan.left_alone if left.fqn not in cut}
    return Plan(
        data_parallel_size=distinct[0].data_parallel_size,
        sites=ordered,
        left_alone=tuple(rest.values()),
        chosen=tuple(dict.fromkeys(choice for plan in distinct for choice in plan.chosen)),
        paths_by=distinct[0].paths_by,
    )


def _site_key(site: Site) -> tuple[str, tuple[str, ...]]:
    return site.component, tuple(weight.fqn for weight in site.weights)


def make_site(
    component: str,
    weights: tuple[WeightCut, ...],
    group_size: int,
    path: Path,
    ops: str = "",
    ranges: Sequence[tuple[int, Path]] = (),
) -> Site:
    """The plan's record of a site that takes `path`. ops: as text, those run on others' tokens."""
    return Site(
        component=component,
        weights=weights,
        group_size=group_size,
        path=str(path),
        cuts=tuple(cut.value for cut in path.cuts),
        collectives=tuple(c.value for c in path.collectives),
        widths=path.widths,
        bytes_per_token=path.bytes_per_token,
        ranges=_ranged(ranges) if any(other != path for _, other in ranges) else (),
        ops=hashlib.sha256(ops.encode()).hexdigest()[:8] if ops else "",
    )


def _ranged(ranges: Sequence[tuple[int, Path]]) -> tuple[RangedPath, ...]:
    return tuple(
        RangedPath(
            from_tokens=first,
            path=str(path),
            collectives=tuple(c.value for c in path.collectives),
            widths=path.widths,
            bytes_per_token=path.bytes_per_token,
            gathered_bytes=path.gathered_bytes,
        )
        for (first, path), before in zip(ranges, ((0, None), *ranges), strict=False)
        if path != before[1]
    )


def format_bytes(count: float) -> str:
    """Bytes in the largest binary unit below them."""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"

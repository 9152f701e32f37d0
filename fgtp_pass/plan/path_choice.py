"""Which path each site takes, where sites that touch may share a stretch of the group's tokens.

A site that hands the tokens of the whole group on (ends in `All`) saves the next one its first
message; two sites whose results are added save one of their two last ones. Sites and links make a
forest, so the best choice is found from its leaves: each site's best path, given where it starts.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from fgtp_pass.algebra.path import Move, Path, StageShape, legal_paths
from fgtp_pass.algebra.placement import Placement
from fgtp_pass.algebra.price import Price, Pricing, total
from fgtp_pass.detect.match import Match
from fgtp_pass.detect.touching import Behind, Beside, Links

OWN, ALL, SUM = Placement.OWN, Placement.ALL, Placement.SUM


@dataclass(frozen=True)
class Choice:
    """A path for each site, and the links that these paths use."""

    paths: Mapping[Match, Path]
    beside: tuple[Beside, ...] = ()
    behind: tuple[Behind, ...] = ()

    @property
    def links(self) -> tuple[Beside | Behind, ...]:
        return (*self.beside, *self.behind)

    def of(self, components: Collection[str]) -> "Choice":
        """That of some components' sites, with the links between them."""
        return Choice(
            {match: path for match, path in self.paths.items() if match.component in components},
            tuple(pair for pair in self.beside if pair.first.component in components),
            tuple(link for link in self.behind if link.second.component in components),
        )


@dataclass(eq=False)
class _Unit:
    """A site, or two beside each other, with the links to the sites behind it."""

    sites: tuple[Match, ...]
    pair: Beside | None = None
    behind: list[Behind] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class _Option:
    """What one unit may do: its paths, where it ends, what that costs, which links it uses."""

    price: Price
    paths: tuple[tuple[Match, Path], ...]
    end: Placement
    beside: tuple[Beside, ...] = ()
    behind: tuple[Behind, ...] = ()


class _Chooser:
    def __init__(
        self,
        shapes: Mapping[Match, Sequence[StageShape]],
        sizes: Mapping[Match, int],
        links: Links,
        pricing: Mapping[Match, Pricing],
    ):
        self.shapes, self.sizes, self.pricing = shapes, sizes, pricing
        self.units = _units(shapes, sizes, links)
        self.unit_of = {site: unit for unit in self.units for site in unit.sites}
        self.entered = {link.second for unit in self.units for link in unit.behind}
        self._best: dict[tuple[_Unit, Match | None], _Option] = {}

    def choose(self) -> Choice:
        for unit in reversed(self.units):  # what is behind first: no deep recursion
            for entered in (None, *(site for site in unit.sites if site in self.entered)):
                self.best(unit, entered)
        roots = [u for u in self.units if not any(site in self.entered for site in u.sites)]
        chosen = [self.best(unit, None) for unit in roots]
        return Choice(
            dict(pair for option in chosen for pair in option.paths),
            tuple(link for option in chosen for link in option.beside),
            tuple(link for option in chosen for link in option.behind),
        )

    def best(self, unit: _Unit, entered: Match | None) -> _Option:
        """The best way through a unit and all behind it; `entered` gets the tokens of all."""
        if (unit, entered) not in self._best:
            ways = (self._with_behind(unit, option) for option in self._options(unit, entered))
            options = [way for way in ways if way is not None]
            self._best[unit, entered] = min(options, key=lambda option: option.price)
        return self._best[unit, entered]

    def _with_behind(self, unit: _Unit, option: _Option) -> _Option | None:
        """The option with the best of all behind it; None where none of that needs its end."""
        parts, used, joins = [option], list[Behind](), False
        for link in unit.behind:
            next_unit = self.unit_of[link.second]
            apart = self.best(next_unit, None)
            if option.end is ALL:
                joined = self.best(next_unit, link.second)
                if joined.price <= apart.price:
                    used.append(link)
                    apart, joins = joined, True
            parts.append(apart)
            used += apart.behind
        if option.end is ALL and not joins:
            return None
        return _Option(
            total([part.price for part in parts]),
            tuple(pair for part in parts for pair in part.paths),
            option.end,
            tuple(link for part in parts for link in part.beside),
            tuple(used),
        )

    def _options(self, unit: _Unit, entered: Match | None) -> Iterable[_Option]:
        """The ways through a unit alone."""
        ends = [OWN, ALL] if unit.behind else [OWN]
        if unit.pair is None:
            (site,) = unit.sites
            for end in ends:
                path = self._path(site, entered, end, unit)
                if path is not None:
                    yield _Option(self.pricing[site](path), ((site, path),), end)
            return
        first, second = unit.sites
        one, other = (self._path(site, entered, OWN, unit) for site in unit.sites)
        assert one is not None
        assert other is not None
        price = total([self.pricing[first](one), self.pricing[second](other)])
        yield _Option(price, ((first, one), (second, other)), OWN)
        summed = self._path(first, entered, SUM, unit)
        for end in ends:
            path = self._path(second, entered, end, unit, through_sum=True)
            if summed is not None and path is not None:
                path = path.carrying(first.component)
                price = total([self.pricing[first](summed), self.pricing[second](path)])
                paths = ((first, summed), (second, path))
                yield _Option(price, paths, end, (unit.pair,))

    def _path(
        self,
        site: Match,
        entered: Match | None,
        end: Placement,
        unit: _Unit,
        through_sum: bool = False,
    ) -> Path | None:
        """The site's best path to `end`, from the tokens of all if it is the one entered."""
        residual, may_add = _residual_of(unit) if end is ALL else (False, True)
        shapes = self.shapes[site]
        paths = legal_paths(
            shapes,
            self.sizes[site],
            ALL if site is entered else OWN,
            end,
            shapes[-1].out_bytes if residual else None,
        )
        fitting = [
            path
            for path in paths
            if (not through_sum or _sums_last(path))
            and (not residual or may_add or not _sums_last(path))
        ]
        return min(fitting, key=self.pricing[site], default=None)


def _residual_of(unit: _Unit) -> tuple[bool, bool]:
    """Whether what is behind the unit reads a residual, and whether that may be added to a sum."""
    if unit.pair is not None and unit.pair.residual is not None:
        return True, True
    region = unit.behind[0].region
    return region.residual is not None, region.added is not None


def _sums_last(path: Path) -> bool:
    """Whether the path's last move adds partial sums."""
    moves = [step for step in path.steps if isinstance(step, Move) and step.collective]
    return path.end is SUM or bool(moves and moves[-1].source is SUM)


def _units(
    shapes: Mapping[Match, Sequence[StageShape]], sizes: Mapping[Match, int], links: Links
) -> list[_Unit]:
    """Sites and pairs with the links between those that have one group size."""
    pairs = [
        pair
        for pair in links.beside
        if pair.first in sizes and sizes[pair.first] == sizes.get(pair.second)
    ]
    paired = {site for pair in pairs for site in (pair.first, pair.second)}
    units = {id(pair): _Unit((pair.first, pair.second), pair) for pair in pairs}
    units |= {id(site): _Unit((site,)) for site in shapes if site not in paired}
    for link in links.behind:
        unit = units.get(id(link.first))
        if unit is None or sizes.get(link.second) != sizes[unit.sites[0]]:
            continue
        if all(_same_source(link, other) for other in unit.behind):
            unit.behind.append(link)
    position = {site: number for number, site in enumerate(shapes)}
    ordered = sorted(units.values(), key=lambda unit: max(position[site] for site in unit.sites))
    _one_entry_each(ordered)
    return ordered


def _same_source(link: Behind, other: Behind) -> bool:
    return (link.region.residual, link.region.added) == (other.region.residual, other.region.added)


def _one_entry_each(units: list[_Unit]) -> None:
    """Of two sites beside each other one may be entered, or a unit had two in front of it."""
    partner = {u.sites[i]: u.sites[1 - i] for u in units if u.pair is not None for i in (0, 1)}
    entered: set[Match] = set()
    for unit in units:
        for link in list(unit.behind):
            if partner.get(link.second) in entered:
                unit.behind.remove(link)
            else:
                entered.add(link.second)


Key = TypeVar("Key")


def choose_paths(
    shapes: Mapping[Match, Sequence[StageShape]],
    sizes: Mapping[Match, int],
    links: Links,
    pricing: Callable[[Match], Pricing],
) -> Choice:
    """The paths with the smallest price in all.

    shapes: by site, of its stages, in graph order. sizes: of the sites' groups. pricing: by site.
    """
    by_site = {site: pricing(site) for site in shapes}
    return _Chooser(shapes, sizes, links, by_site).choose()

"""plan: from sites and sizes to a `Plan`, the best legal path for each site."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from sympy import sympify
from torch import fx

from fgtp_pass.algebra.path import Path, StageShape
from fgtp_pass.algebra.placement import APPLY, Cut, Placement
from fgtp_pass.detect.detect import Detection
from fgtp_pass.detect.match import LookupStage, Match, MatmulStage
from fgtp_pass.detect.touching import Behind, Beside, Links
from fgtp_pass.errors import DetectionError
from fgtp_pass.graph.op_kinds import is_value, value_of
from fgtp_pass.graph.size_expression import traced_sizes
from fgtp_pass.graph.text import ops_text
from fgtp_pass.plan.path_choice import Choice, choose_paths
from fgtp_pass.plan.plan import LeftAlone, Plan, Site, WeightCut, make_site
from fgtp_pass.plan.prices import Prices
from fgtp_pass.plan.token_ranges import Firsts, Ranges, range_numbers, ranges_of

Shards = Mapping[fx.Node, tuple[WeightCut, int]]


@dataclass(frozen=True, eq=False)
class PlannedSite:
    """A site of the plan together with where it is in this graph.

    cuts: by placeholder, how each of its parameters is cut.
    """

    site: Site
    match: Match
    path: Path
    cuts: Mapping[fx.Node, WeightCut]


@dataclass(frozen=True, eq=False)
class PlannedGraph:
    """The plan of one graph and what the rewriter needs beside it.

    beside, behind: the links between sites that their paths use. ranges: by the components of sites
    that change their paths together, these from which number of tokens on; empty where the sites'
    paths are those for any number.
    """

    plan: Plan
    sites: tuple[PlannedSite, ...]
    detection: Detection
    beside: tuple[Beside, ...] = ()
    behind: tuple[Behind, ...] = ()
    ranges: Ranges = field(default_factory=dict)

    @property
    def firsts(self) -> Firsts:
        return {of: tuple(one.first for one in ranges) for of, ranges in self.ranges.items()}

    def program(self, tokens: Mapping[str, int]) -> tuple[int, ...]:
        """Which range each of `ranges` is in. tokens: the most that a component sees, by name."""
        return range_numbers(self.firsts, tokens)

    @property
    def traced(self) -> tuple[int, ...]:
        """The ranges of what the graph was traced with."""
        known = traced_sizes(self.detection.view.graph)
        most: dict[str, int] = {}
        for site in self.sites:
            tokens = int(sympify(site.match.tokens).xreplace(known))
            component = site.match.component
            most[component] = max(tokens, most.get(component, 0))
        return self.program(most)

    def at(self, program: tuple[int, ...]) -> "PlannedGraph":
        """The graph with the paths of these ranges, the same for any number of tokens."""
        taken = [ranges[i].choice for ranges, i in zip(self.ranges.values(), program, strict=True)]
        if not taken:
            return self
        paths = {match: path for choice in taken for match, path in choice.paths.items()}
        return replace(
            self,
            sites=tuple(replace(site, path=paths[site.match]) for site in self.sites),
            beside=tuple(pair for choice in taken for pair in choice.beside),
            behind=tuple(link for choice in taken for link in choice.behind),
            ranges={},
        )

    @property
    def all_behind(self) -> set[Behind]:
        """The links of sites behind each other that the paths for any number of tokens use."""
        ranged = (one.choice.behind for ranges in self.ranges.values() for one in ranges)
        return {link for links in (self.behind, *ranged) for link in links}

    @cached_property
    def fronts(self) -> Mapping[Match, PlannedSite]:
        """By site, the first site of the stretch that it is in; all of a stretch see its tokens."""
        stretch = {site.match: [site] for site in self.sites}
        for first, second in self._touching():
            if stretch[first] is not stretch[second]:
                stretch[first] += stretch[second]
                for site in stretch[second]:
                    stretch[site.match] = stretch[first]
        order = {site: number for number, site in enumerate(self.sites)}
        return {match: min(sites, key=order.__getitem__) for match, sites in stretch.items()}

    def _touching(self) -> Iterator[tuple[Match, Match]]:
        links: tuple[Beside | Behind, ...] = (*self.beside, *self.behind)
        yield from (link.between for link in links)


def plan_graph(
    detection: Detection,
    sizes: Mapping[str, int],
    data_parallel_size: int,
    in_force: Shards | None = None,
    prices: Prices | None = None,
    joins: bool = True,
) -> PlannedGraph:
    """Plan all sites of the components whose size is > 1.

    in_force: parameters that are sharded already; a site that would cut one otherwise is left out.
    prices: by default the fewest messages, then bytes. joins: whether sites that touch may share a
    stretch; without, each component's sites are as they would be by themselves.

    Raises DetectionError where one parameter serves two components of different sizes.
    """
    _check_tied(detection, sizes)
    prices = prices or Prices()
    links = detection.links if joins else Links()
    of_size = {m: sizes[m.component] for m in detection.matches if sizes.get(m.component, 1) > 1}
    choice, cuts = _choose(detection, links, of_size, in_force or {}, prices)
    ranges = _ranges(detection, links, of_size, cuts, prices) if prices.by_range else {}
    planned = _planned_sites(detection, choice, of_size, cuts, ranges)
    left_alone = dict(detection.left_alone)
    cut = {placeholder for site in planned for placeholder in site.cuts}
    for match in detection.matches:
        is_off = sizes.get(match.component, 1) <= 1
        reason = f"{match.component} is off" if is_off else "another site cuts a part of its site"
        for placeholder in match.parameters:
            if placeholder not in cut:
                left_alone[detection.view.parameters[placeholder]] = reason
    plan = Plan(
        data_parallel_size=data_parallel_size,
        sites=tuple(site.site for site in planned),
        left_alone=tuple(LeftAlone(fqn=f, reason=r) for f, r in sorted(left_alone.items())),
        paths_by=prices.said,
    )
    return PlannedGraph(plan, planned, detection, choice.beside, choice.behind, ranges)


_Cuts = Mapping[Match, Mapping[fx.Node, WeightCut]]


def _choose(
    detection: Detection,
    links: Links,
    sizes: Mapping[Match, int],
    in_force: Shards,
    prices: Prices,
) -> tuple[Choice, _Cuts]:
    """The paths for decode, and how they cut the weights.

    Of two sites that would cut one parameter differently the first stays: its cut is what is in
    force for the others.
    """
    names = detection.view.parameters
    fixed = dict(in_force)
    while True:
        shapes = {
            match: shaped
            for match, size in sizes.items()
            if (shaped := _stage_shapes(match, size, fixed, names))
        }
        by_site = prices.by_site(prices.decode_tokens)
        choice = choose_paths(shapes, sizes, links, by_site)
        cuts = {match: _site_cuts(match, path, names) for match, path in choice.paths.items()}
        clash = _first_clash(cuts, sizes)
        if clash is None:
            return choice, cuts
        fixed |= {p: (cut, sizes[clash]) for p, cut in cuts[clash].items()}


def _ranges(
    detection: Detection, links: Links, sizes: Mapping[Match, int], cuts: _Cuts, prices: Prices
) -> Ranges:
    """The paths for other numbers of tokens, on weights that are cut as for decode, or gathered."""
    held = {p: (cut, sizes[match]) for match, by_p in cuts.items() for p, cut in by_p.items()}
    names = detection.view.parameters
    by_tokens = {match: _stage_shapes(match, sizes[match], held, names) for match in cuts}
    gathering = {match: _stage_shapes(match, sizes[match], held, names, True) for match in cuts}

    def solve(tokens: int) -> Choice:
        shapes = {
            match: gathering[match]
            if prices.may_gather(match, gathering[match], sizes[match], tokens)
            else by_tokens[match]
            for match in cuts
        }
        return choose_paths(shapes, sizes, links, prices.by_site(tokens))

    return ranges_of(solve)


def _planned_sites(
    detection: Detection,
    choice: Choice,
    sizes: Mapping[Match, int],
    cuts: _Cuts,
    ranges: Ranges,
) -> tuple[PlannedSite, ...]:
    between = {link.second: link for link in choice.behind}
    of_component = {name: one for names, one in ranges.items() for name in names}
    planned = []
    for match in filter(cuts.__contains__, detection.matches):  # in graph order
        site = make_site(
            match.component,
            tuple(cuts[match].values()),
            sizes[match],
            choice.paths[match],
            _others_ops(match, between.get(match), detection.view.numbers),
            [(one.first, one.choice.paths[match]) for one in of_component.get(match.component, ())],
        )
        planned.append(PlannedSite(site, match, choice.paths[match], cuts[match]))
    return tuple(planned)


def _others_ops(match: Match, link: Behind | None, numbers: Mapping[fx.Node, str]) -> str:
    """The ops that this rank runs on the tokens of others: they must be the same on all."""
    regions = [s.region for s in match.stages if isinstance(s, MatmulStage) and s.region]
    ops = [*(link.region.ops if link else ()), *(op for region in regions for op in region.ops)]
    reads_numbers = any(not is_value(n) for op in ops for n in op.all_input_nodes)
    return "\n".join([ops_text(ops), *(numbers.values() if reads_numbers else ())])


def _first_clash(
    cuts: Mapping[Match, Mapping[fx.Node, WeightCut]], sizes: Mapping[Match, int]
) -> Match | None:
    """The first of two sites that cut one parameter differently, or None."""
    first: dict[fx.Node, Match] = {}
    for match, by_placeholder in cuts.items():
        for placeholder, cut in by_placeholder.items():
            owner = first.setdefault(placeholder, match)
            if cuts[owner][placeholder] != cut or sizes[owner] != sizes[match]:
                return owner
    return None


def _site_cuts(match: Match, path: Path, names: Mapping[fx.Node, str]) -> dict[fx.Node, WeightCut]:
    cuts: dict[fx.Node, WeightCut] = {}
    for stage, cut in zip(match.stages, path.cuts, strict=True):
        cuts |= _stage_cuts(stage, cut, names)
    return cuts


def _stage_shapes(
    match: Match,
    size: int,
    in_force: Shards,
    names: Mapping[fx.Node, str],
    gathers: bool = False,
) -> tuple[StageShape, ...]:
    """The stages as the algebra sees them; empty where what is in force allows no cut of one.

    gathers: whether their weights may be gathered, which tables are not.
    """
    shapes = []
    for stage in match.stages:
        by_cut = {cut: _stage_cuts(stage, cut, names) for cut in stage.cuts}
        allowed = {cut: cuts for cut, cuts in by_cut.items() if _fits(cuts, size, in_force)}
        if not allowed:
            return ()
        shape = _stage_shape(stage, tuple(allowed))
        if gathers and isinstance(stage, MatmulStage):
            cut = [c for c in next(iter(allowed.values())).values() if c.cut_dim is not None]
            shape = replace(shape, weight_bytes=sum(c.nbytes for c in cut), weights=len(cut))
        shapes.append(shape)
    return tuple(shapes)


def _fits(cuts: Mapping[fx.Node, WeightCut], size: int, in_force: Shards) -> bool:
    """Whether the parameters are whole, or sharded in just this way."""
    return all(
        in_force[p][1] == size and cut.cuts_like(in_force[p][0])
        for p, cut in cuts.items()
        if p in in_force
    )


def _stage_shape(stage: LookupStage | MatmulStage, cuts: tuple[Cut, ...]) -> StageShape:
    if isinstance(stage, LookupStage):
        ids, table = value_of(stage.lookup.ids), stage.lookup.weight
        out_bytes = table.out_features * table.value.dtype.itemsize
        in_bytes, dtype = ids.dtype.itemsize, table.value.dtype
    else:
        data, result = value_of(stage.matmuls[0].input), value_of(stage.matmuls[0].node)
        outs = sum(m.weight.out_features for m in stage.matmuls if m.weight is not None)
        in_bytes, dtype = int(data.shape[-1]) * data.dtype.itemsize, result.dtype
        out_bytes = outs * dtype.itemsize
    sum_bytes = out_bytes * max(1, 4 // dtype.itemsize)  # half precision is added in fp32
    return StageShape(cuts, in_bytes, out_bytes, sum_bytes)


def _stage_cuts(
    stage: LookupStage | MatmulStage, cut: Cut, names: Mapping[fx.Node, str]
) -> dict[fx.Node, WeightCut]:
    def record(placeholder: fx.Node, dim: int | None, blocks: int = 1) -> None:
        value = value_of(placeholder)
        cuts[placeholder] = WeightCut(
            fqn=names[placeholder],
            shape=tuple(int(s) for s in value.shape),
            dtype=str(value.dtype).removeprefix("torch."),
            cut_dim=dim,
            blocks=blocks,
        )

    cuts: dict[fx.Node, WeightCut] = {}
    if isinstance(stage, LookupStage):
        record(stage.lookup.weight.placeholder, stage.lookup.weight.in_dim)
        return cuts
    for matmul, blocks in zip(stage.matmuls, stage.blocks, strict=True):
        weight = matmul.weight
        assert weight is not None
        if cut is Cut.OUT:
            record(weight.placeholder, weight.out_dim, blocks)
        else:
            record(weight.placeholder, weight.in_dim)
        if matmul.bias is not None:
            # after a sum a bias is added once, by the rank that owns the token
            sums = APPLY[cut][1] is Placement.SUM
            record(matmul.bias, None if sums else 0, 1 if sums else blocks)
    if stage.region is not None:
        for vector in stage.region.vectors:
            record(vector, 0, int(value_of(vector).shape[0]) // stage.region.width)
    return cuts


def _check_tied(detection: Detection, sizes: Mapping[str, int]) -> None:
    """A parameter that two components share has one placement, so they need one size.

    But for a component that nobody asked for: what it reads is gathered where it is cut.
    """
    owners: dict[fx.Node, dict[str, int]] = {}
    for match in detection.matches:
        size = max(1, sizes.get(match.component, 1))
        if size == 1 and match.component in detection.opt_in:
            continue
        for placeholder in match.parameters:
            owners.setdefault(placeholder, {})[match.component] = size
    for placeholder, by_component in owners.items():
        if len(set(by_component.values())) > 1:
            listed = " and ".join(f"{name} has {size}" for name, size in by_component.items())
            raise DetectionError(
                f"{detection.view.parameters[placeholder]} is one tied weight of two components, "
                f"but their sizes differ: {listed}. Give them the same size."
            )


def check_requested(plan: Plan, requested: Mapping[str, int], allow_missing: Sequence[str]) -> None:
    """Raise DetectionError if an explicitly requested component has no site."""
    present = {site.component for site in plan.sites}
    missing = [
        name
        for name, size in requested.items()
        if size > 1 and name not in present and name not in allow_missing
    ]
    if missing:
        names = ", ".join(missing)
        raise DetectionError(
            f"{names}: requested in finegrained_tp_config, but no site of it was found in this "
            f"graph. Leave it out, or pass allow_missing={missing!r} if the model has none, or "
            "has it in another graph of a model that Dynamo splits."
        )

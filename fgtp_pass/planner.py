"""plan: from sites and sizes to a `Plan`, the cheapest legal path for each site."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from fgtp_pass.algebra import APPLY, Cut, Path, Placement, StageShape, cheapest_path
from fgtp_pass.detect import Detection
from fgtp_pass.errors import DetectionError
from fgtp_pass.ops import value_of
from fgtp_pass.pattern import LookupStage, Match, MatmulStage
from fgtp_pass.plan import LeftAlone, Plan, Site, WeightCut, make_site


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
    """The plan of one graph and what the rewriter needs beside it."""

    plan: Plan
    sites: tuple[PlannedSite, ...]
    detection: Detection


def plan_graph(
    detection: Detection, sizes: Mapping[str, int], data_parallel_size: int
) -> PlannedGraph:
    """Plan all sites of the components whose size is > 1.

    Raises DetectionError where one parameter serves two components of different sizes.
    """
    planned: list[PlannedSite] = []
    left_alone = dict(detection.left_alone)
    token_counts: dict[str, list[object]] = {}
    for match in detection.matches:
        size = sizes.get(match.component, 1)
        if size > 1:
            planned.append(_plan_site(detection, match, size, token_counts))
    _keep_one_cut_each(planned)
    cut = {placeholder for site in planned for placeholder in site.cuts}
    for match in detection.matches:
        is_off = sizes.get(match.component, 1) <= 1
        reason = f"{match.component} is off" if is_off else "another site cuts a part of its site"
        for placeholder in match.parameters:
            if placeholder not in cut:
                left_alone[detection.view.parameters[placeholder]] = reason
    _check_tied(detection, sizes)
    plan = Plan(
        data_parallel_size=data_parallel_size,
        sites=tuple(site.site for site in planned),
        left_alone=tuple(LeftAlone(fqn=f, reason=r) for f, r in sorted(left_alone.items())),
    )
    return PlannedGraph(plan, tuple(planned), detection)


def _plan_site(
    detection: Detection, match: Match, size: int, token_counts: dict[str, list[object]]
) -> PlannedSite:
    path = cheapest_path([_stage_shape(stage) for stage in match.stages], size)
    cuts: dict[fx.Node, WeightCut] = {}
    for stage, cut in zip(match.stages, path.cuts, strict=True):
        cuts |= _stage_cuts(stage, cut, detection.view.parameters)
    # sites whose token counts are the same expression share a number
    count = tokens_of(match)
    seen = token_counts.setdefault(match.component, [])
    if count not in seen:
        seen.append(count)
    site = make_site(match.component, tuple(cuts.values()), size, path, seen.index(count))
    return PlannedSite(site, match, path, cuts)


def tokens_of(match: Match) -> object:
    """The number of tokens that the site runs at: an int, or an expression in input sizes."""
    sizes = value_of(match.source).shape
    if not isinstance(match.stages[0], LookupStage):
        sizes = sizes[:-1]
    count = 1
    for size in sizes:
        count = count * size
    return count.node.expr if isinstance(count, torch.SymInt) else count


def _stage_shape(stage: LookupStage | MatmulStage) -> StageShape:
    if isinstance(stage, LookupStage):
        ids, table = value_of(stage.lookup.ids), stage.lookup.weight
        out_bytes = table.out_features * table.value.dtype.itemsize
        return StageShape(stage.cuts, ids.dtype.itemsize, out_bytes)
    data = value_of(stage.matmuls[0].input)
    result = value_of(stage.matmuls[0].node)
    outs = sum(m.weight.out_features for m in stage.matmuls if m.weight is not None)
    return StageShape(
        stage.cuts, int(data.shape[-1]) * data.dtype.itemsize, outs * result.dtype.itemsize
    )


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


def _keep_one_cut_each(planned: list[PlannedSite]) -> None:
    """Drop the later of two sites that would cut one parameter differently; it is gathered."""
    cuts: dict[fx.Node, WeightCut] = {}
    for site in list(planned):
        if any(cuts.setdefault(p, cut) != cut for p, cut in site.cuts.items()):
            planned.remove(site)


def _check_tied(detection: Detection, sizes: Mapping[str, int]) -> None:
    """A parameter that two components share has one placement, so they need one size."""
    owners: dict[fx.Node, dict[str, int]] = {}
    for match in detection.matches:
        for placeholder in match.parameters:
            size = max(1, sizes.get(match.component, 1))
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

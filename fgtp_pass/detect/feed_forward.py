"""The FFNs of a graph, whatever they are for: several components are chosen from them."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from fgtp_pass.algebra.placement import Cut
from fgtp_pass.detect.match import Findings, Match, MatmulStage, Refusal, count_depends_on_data
from fgtp_pass.graph.dataflow import GraphView
from fgtp_pass.graph.facts import Reach
from fgtp_pass.graph.normal_form import ParamMatmul
from fgtp_pass.graph.op_kinds import OpKind, op_kind, value_of
from fgtp_pass.graph.region import NoRegion, Region, find_region


@dataclass(frozen=True, eq=False)
class FeedForward:
    """One or two projections up, an activation function per feature, and a projection down.

    why_not: a reason if it only resembles an FFN. why_whole: a reason if it is one that cannot be
    cut.
    """

    ups: tuple[ParamMatmul, ...]
    region: Region
    down: ParamMatmul
    why_not: str
    why_whole: str

    @property
    def input(self) -> fx.Node:
        return self.ups[0].input

    def match(self, component: str) -> Match:
        """The site: cut over the inner features, which every rank makes a part of."""
        return feed_forward(component, self.region, self.down)

    def refused(self, reason: str) -> Iterator[Refusal]:
        """The refusals of all its weights."""
        for matmul in (*self.ups, self.down):
            if matmul.weight is not None:
                yield Refusal(matmul.weight.placeholder, reason)


def feed_forward(component: str, region: Region, down: ParamMatmul) -> Match:
    """The site of the projections up and down around a region."""
    blocks = tuple(len(region.blocks[up.node]) for up in region.ups)
    first = MatmulStage(region.ups, (Cut.OUT,), blocks, region)
    second = MatmulStage((down,), (Cut.IN,), (1,))
    return Match(component, (first, second), region.ups[0].input, (down.node,))


def feed_forwards(view: GraphView, found: Findings) -> Iterator[FeedForward | Refusal]:
    """All that no pattern has claimed, in graph order; a refusal for what only resembles one."""
    for down in view.matmuls:
        if down.weight is None or down.node in found.claimed:
            continue
        if down.node in view.adapters or down.node in view.adapters.values():
            continue
        region = find_region(view, down)
        if isinstance(region, NoRegion):
            if region.reads_projection and Reach.ATTENTION not in view.reach[down.node]:
                yield Refusal(down.weight.placeholder, region.reason)
            continue
        ups = region.ups
        if any(up.weight is None or up.node in found.claimed for up in ups):
            continue
        why_not = next((m.why_not for m in (*ups, down) if m.why_not), "")
        why_not = why_not or _why_not(view, down, region)
        yield FeedForward(ups, region, down, why_not, _why_whole(down, region))


def _why_not(view: GraphView, down: ParamMatmul, region: Region) -> str:
    """Why matmuls joined by a region are no FFN."""
    ups = region.ups
    read = {(view.exact_root(up.input), value_of(up.input).dtype) for up in ups}
    assert down.weight is not None
    if len(ups) > 2 or len(read) > 1:
        return "it joins projections of different activations"
    if not any(op_kind(op) in (OpKind.POINTWISE, OpKind.FEATURES) for op in region.ops):
        return "it is a low-rank pair: no activation function stands between the projections"
    if any(up.weight and up.weight.in_features != down.weight.out_features for up in ups):
        return "it is a chain of projections that does not return to its input's width"
    return ""


def _why_whole(down: ParamMatmul, region: Region) -> str:
    ups = region.ups
    placeholders = [m.weight.placeholder for m in (*ups, down) if m.weight]
    vectors = [*region.vectors, *(m.bias for m in (*ups, down) if m.bias is not None)]
    if len({*placeholders, *vectors}) < len(placeholders) + len(vectors):
        return "one of its parameters has two roles"
    return count_depends_on_data(down.input)

"""What a component's pattern is made of: see docs/patterns.md for how to write one."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import fx

from fgtp_pass.algebra.placement import Cut
from fgtp_pass.graph.dataflow import GraphView
from fgtp_pass.graph.normal_form import Lookup, ParamMatmul
from fgtp_pass.graph.op_kinds import count_of, value_of
from fgtp_pass.graph.region import Region


@dataclass(frozen=True, eq=False)
class LookupStage:
    """A lookup whose table is cut by rows."""

    lookup: Lookup

    cuts = (Cut.ROWS,)


@dataclass(frozen=True, eq=False)
class MatmulStage:
    """Matmuls side by side on one input, then an optional region of ops local to a feature.

    cuts: the ways in which the component may cut these weights. blocks: per matmul, how many equal
    blocks its outputs are (2 for a fused gate and up projection).
    """

    matmuls: tuple[ParamMatmul, ...]
    cuts: tuple[Cut, ...]
    blocks: tuple[int, ...]
    region: Region | None = None


Stage = LookupStage | MatmulStage


@dataclass(frozen=True, eq=False)
class Match:
    """A found site: `stages` take the activation `source` to `outputs`, which are replaced.

    outputs: the results of the last stage, in graph order: one, or those of matmuls side by side.
    """

    component: str
    stages: tuple[Stage, ...]
    source: fx.Node
    outputs: tuple[fx.Node, ...]

    @property
    def place(self) -> fx.Node:
        """The node in whose place the site is computed: later ones would come after its users."""
        return self.outputs[0]

    @property
    def nodes(self) -> set[fx.Node]:
        """The nodes that the site computes, or leaves out."""
        nodes: set[fx.Node] = set()
        for stage in self.stages:
            if isinstance(stage, LookupStage):
                nodes.add(stage.lookup.node)
                continue
            nodes.update(matmul.node for matmul in stage.matmuls)
            if stage.region is not None:
                nodes.update(stage.region.ops, stage.region.alias)
        return nodes

    @property
    def tokens(self) -> object:
        """The number of tokens that it runs at: an int, or an expression in input sizes."""
        sizes = value_of(self.source).shape
        return count_of(sizes if isinstance(self.stages[0], LookupStage) else sizes[:-1])

    @property
    def weights(self) -> list[fx.Node]:
        """The placeholders of the weights that the site cuts, if it does; a bias may stay whole."""
        return [
            *(s.lookup.weight.placeholder for s in self.stages if isinstance(s, LookupStage)),
            *(
                matmul.weight.placeholder
                for stage in self.stages
                if isinstance(stage, MatmulStage)
                for matmul in stage.matmuls
                if matmul.weight is not None
            ),
        ]

    @property
    def parameters(self) -> list[fx.Node]:
        """The placeholders of all parameters that the site takes over."""
        nodes: list[fx.Node] = []
        for stage in self.stages:
            if isinstance(stage, LookupStage):
                nodes.append(stage.lookup.weight.placeholder)
                continue
            for matmul in stage.matmuls:
                nodes += [matmul.weight.placeholder] if matmul.weight else []
                nodes += [matmul.bias] if matmul.bias else []
            nodes += stage.region.vectors if stage.region else ()
        return nodes


@dataclass(frozen=True)
class Refusal:
    """A parameter that the pattern looked at and leaves alone, with the reason."""

    placeholder: fx.Node
    reason: str


@dataclass
class Findings:
    """What the patterns that ran before have claimed."""

    matches: list[Match] = field(default_factory=list)
    claimed: set[fx.Node] = field(default_factory=set)

    def of(self, component: str) -> list[Match]:
        return [match for match in self.matches if match.component == component]

    def add(self, match: Match) -> None:
        self.matches.append(match)
        for stage in match.stages:
            if isinstance(stage, LookupStage):
                self.claimed.add(stage.lookup.node)
            else:
                self.claimed.update(matmul.node for matmul in stage.matmuls)


Finder = Callable[[GraphView, Findings], Iterable[Match | Refusal]]


@dataclass(frozen=True)
class Pattern:
    """The definition of a component.

    component: its name in plans. config_key: its key in `finegrained_tp_config`. aliases: other
    systems' keys for it. find: yields its sites, and refusals with reasons, in graph order. opt_in:
    whether it stays whole unless its key is given, or the cost model chooses sizes.
    """

    component: str
    config_key: str
    find: Finder
    aliases: tuple[str, ...] = ()
    opt_in: bool = False


def by_activation(view: GraphView, matmuls: Iterable[ParamMatmul]) -> list[list[ParamMatmul]]:
    """Those that read one activation and give one dtype together: they may share collectives."""
    found: dict[tuple[fx.Node, torch.dtype, torch.dtype], list[ParamMatmul]] = {}
    for matmul in matmuls:
        dtypes = value_of(matmul.input).dtype, value_of(matmul.node).dtype
        found.setdefault((view.exact_root(matmul.input), *dtypes), []).append(matmul)
    return list(found.values())


def single_matmul(component: str, matmul: ParamMatmul, cuts: tuple[Cut, ...]) -> Match | Refusal:
    """The site that one matmul makes by itself, or the refusal if it cannot be cut."""
    assert matmul.weight is not None
    reason = matmul.why_not or count_depends_on_data(matmul.input)
    if reason:
        return Refusal(matmul.weight.placeholder, reason)
    stage = MatmulStage((matmul,), cuts, blocks=(1,))
    return Match(component, (stage,), matmul.input, (matmul.node,))


# Vocabularies are padded to a multiple of this at most (GPU tile sizes: Megatron-LM pads to 128).
_VOCABULARY_MULTIPLE = 128


def same_vocabulary(one: int, other: int) -> bool:
    """Whether two sizes are one vocabulary, up to the padding of the larger."""
    small, large = min(one, other), max(one, other)
    return large <= -(-small // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE


def count_depends_on_data(source: fx.Node) -> str:
    """A reason if the number of tokens of `source` is known only when it has been computed."""
    for size in value_of(source).shape:
        if isinstance(size, torch.SymInt) and not size.node.has_hint():
            return "its number of tokens depends on data"
    return ""

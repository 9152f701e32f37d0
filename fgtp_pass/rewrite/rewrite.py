"""rewrite: apply a plan to a graph through one Rewriter, which copies and never edits.

The copy is a valid graph with fake values at every step, so any backend can take it. Parameters
that are cut become placeholders of their shards, at the same position.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import sympy
import torch
from torch import fx

from fgtp_pass import dynamo
from fgtp_pass.collectives.groups import ComponentGroup
from fgtp_pass.plan.plan import WeightCut
from fgtp_pass.plan.planner import PlannedGraph, PlannedSite
from fgtp_pass.rewrite.graph_writer import GraphWriter, replaced_nodes
from fgtp_pass.rewrite.rewriter import Rewriter
from fgtp_pass.weights.cut import gather_weight

# A size of 0 or 1 is never dynamic for torch's compiler, so ragged sites run at 2 rows at least.
MINIMUM_ROWS = 2


@dataclass(frozen=True, eq=False)
class RewrittenGraph:
    """A rewritten graph and how to call it.

    shards: position of each cut parameter among the inputs, with its cut and group size.
    gathered: the cut parameters that are gathered, because something else reads them too.
    row_inputs: the placeholders that follow the others, one per component (ragged only): the
    number of rows that every rank of the group runs at, as the first size of a tensor [rows, 0].
    row_examples: example values for these.
    """

    module: fx.GraphModule
    shards: Mapping[int, tuple[WeightCut, int]]
    gathered: Mapping[fx.Node, tuple[WeightCut, int]]
    row_inputs: tuple[fx.Node, ...]
    row_examples: tuple[torch.Tensor, ...]


@dynamo.paused_garbage_collection()
def rewrite(
    module: fx.GraphModule,
    planned: PlannedGraph,
    groups: Mapping[int, ComponentGroup],
    in_force: Mapping[fx.Node, tuple[WeightCut, int]],
    ragged: bool,
) -> RewrittenGraph:
    """The graph with every planned site lowered along its path. `module` itself is not changed.

    groups: this rank's component group by size. in_force: placeholders of parameters that are
    sharded already; where no site takes one, it is gathered in the graph. ragged: pad each site's
    tokens to a number of rows that comes in as an input.
    """
    rewriter = Rewriter(module.graph)
    cuts = dict(in_force)
    for site in planned.sites:
        for placeholder, cut in site.cuts.items():
            if cut.cut_dim is not None:
                cuts[placeholder] = (cut, site.site.group_size)
    replaced = replaced_nodes(planned)
    shards: dict[fx.Node, fx.Node] = {}
    positions: dict[int, tuple[WeightCut, int]] = {}
    for position, node in enumerate(module.graph.find_nodes(op="placeholder")):
        if node in cuts:
            cut, size = cuts[node]
            shards[node] = rewriter.placeholder_like(node, cut.shard_shape(size))
            positions[position] = cuts[node]
        else:
            rewriter.copy(node)
    rows = _row_inputs(rewriter, planned.sites) if ragged else {}
    gathered = {
        placeholder: cuts[placeholder]
        for placeholder in shards
        if any(user not in replaced for user in placeholder.users)
    }
    _gather(rewriter, shards, gathered, groups)
    GraphWriter(rewriter, planned, groups, shards, rows if ragged else None).write()
    rewriter.new.lint()
    rewritten = fx.GraphModule(module, rewriter.new)
    rewritten.meta.update(module.meta)
    row_inputs, row_examples = zip(*rows.values(), strict=True) if rows else ((), ())
    return RewrittenGraph(rewritten, positions, gathered, row_inputs, row_examples)


def _gather(
    rewriter: Rewriter,
    shards: Mapping[fx.Node, fx.Node],
    gathered: Mapping[fx.Node, tuple[WeightCut, int]],
    groups: Mapping[int, ComponentGroup],
) -> None:
    """Where something that no pattern matched reads a cut parameter, gather it in the graph."""
    for placeholder, (cut, size) in gathered.items():
        warnings.warn(
            f"{cut.fqn} is sharded over {size} ranks, but a part of this graph that matches no "
            "component reads it: it is gathered there in every step, which costs its full "
            "size in communication and memory for that time.",
            stacklevel=2,
        )
        whole = gather_weight(rewriter.emit, groups[size], cut, shards[placeholder])
        rewriter.env[placeholder] = whole


def _row_inputs(
    rewriter: Rewriter, sites: Sequence[PlannedSite]
) -> dict[str, tuple[fx.Node, torch.Tensor]]:
    """One more input per component: a tensor of shape [rows, 0], rows >= MINIMUM_ROWS.

    Which sites of a component see as many tokens depends on the sizes that a rank's graph was
    specialised on, so all of them run at the rows of the one with the most. The example sizes are
    primes that no other size is likely to have, so that nothing is taken for equal to them.
    """
    made: dict[str, tuple[fx.Node, torch.Tensor]] = {}
    for number, component in enumerate(dict.fromkeys(site.site.component for site in sites)):
        example = torch.empty(int(sympy.nextprime(100_000 + 100 * number)), 0)
        name = f"fgtp_rows_{component}"
        node = dynamo.add_size_input(rewriter.new, rewriter.fake_mode, name, example)
        made[component] = (node, example)
    return made

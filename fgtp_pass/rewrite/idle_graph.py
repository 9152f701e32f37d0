"""The graph of a rank without tokens: its sites alone, on rows of zeros."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import fx

from fgtp_pass.collectives.groups import ComponentGroup
from fgtp_pass.detect.match import MatmulStage
from fgtp_pass.graph.op_kinds import OpKind, op_kind, value_of
from fgtp_pass.plan.plan import WeightCut
from fgtp_pass.plan.planner import PlannedGraph
from fgtp_pass.rewrite.group_values import GroupValues
from fgtp_pass.weights.cut import gather_weight


def idle_graph(
    module: fx.GraphModule,
    planned: PlannedGraph,
    gathered: Mapping[fx.Node, tuple[WeightCut, int]],
    groups: Mapping[int, ComponentGroup],
    needed: Collection[fx.Node],
) -> fx.GraphModule:
    """The collectives alone, sites on rows of zeros.

    needed: from `idle_needs`. Its inputs are those that are inputs of `module`, then a row count
    per site.
    """
    graph = fx.Graph()
    env: dict[fx.Node, Any] = {}
    for node in module.graph.find_nodes(op="placeholder"):
        if node in needed:
            env[node] = graph.node_copy(node)
    rows = {site: graph.placeholder(f"rows_{number}") for number, site in enumerate(planned.sites)}
    for node in module.graph.nodes:
        if node in needed and node.op != "placeholder":
            env[node] = graph.node_copy(node, lambda n: env[n])

    def emit(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return graph.call_function(target, args, kwargs)

    for placeholder, (cut, size) in gathered.items():
        gather_weight(emit, groups[size], cut, env[placeholder])

    def own(node: fx.Node, count: Any, features: int | None) -> fx.Node:
        value, shape = value_of(node), (count,) if features is None else (count, features)
        zeros: fx.Node = emit(torch.zeros, shape, dtype=value.dtype, device=value.device)
        return zeros

    values = GroupValues(emit, planned, groups, env, env, own)
    places = {site.match.place: site for site in planned.sites}
    for node in module.graph.nodes:
        if node in places:
            site = places[node]
            moves_tokens = bool(site.path.collectives)  # else the weights move, for others to use
            values.site(site, rows[planned.fronts[site.match]] if moves_tokens else 1)
        elif node in values.ops:
            values.op(node)
    graph.output(())
    return fx.GraphModule(module, graph)


def idle_needs(planned: PlannedGraph, sharded: Collection[fx.Node]) -> set[fx.Node]:
    """What the idle graphs of a plan read, whatever the number of tokens.

    The parameters that are sharded, those of the sites, and what the ops on others' tokens read,
    with what makes that.
    """
    needed = set(sharded)
    stack: list[fx.Node] = []
    for site in planned.sites:
        needed.update(site.cuts)
        for stage in site.match.stages:
            region = stage.region if isinstance(stage, MatmulStage) else None
            if region is None:
                continue
            inner = {up.node for up in region.ups} | set(region.ops) | set(region.alias)
            computed = [op for op in region.ops if op_kind(op) is OpKind.POINTWISE]
            stack += [n for op in computed for n in op.all_input_nodes if n not in inner]
    for link in planned.all_behind:
        between = {*link.region.inner, link.region.residual}
        stack += [n for op in link.region.ops for n in op.all_input_nodes if n not in between]
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack += node.all_input_nodes
    return needed

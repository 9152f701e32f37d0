"""vLLM's add and norm in one op, taken apart where sites share a stretch across it.

There the add rides in a sum over the ranks, and the norm runs on the tokens of all of them.
Everywhere else the op stays, with the kernels that vLLM has for it.
"""

import operator
from collections.abc import Collection
from typing import Any

import torch
from torch import fx

from fgtp_pass.plan.planner import PlannedGraph


def is_fused(node: fx.Node) -> bool:
    """Whether the node is (x, residual, weight, epsilon) -> (norm of their sum, their sum)."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or schema.name != "vllm_ir::fused_add_rms_norm":
        return False
    return len(node.args) == 4 and not node.kwargs  # a variance over all features


def take_apart(graph: fx.Graph, node: fx.Node, env: dict[fx.Node, Any]) -> fx.Node:
    """Write the add and the norm into `graph`, and what reads them into `env`; the add."""
    x, residual, weight, epsilon = (env[a] if isinstance(a, fx.Node) else a for a in node.args)
    norm_value, sum_value = node.meta["example_value"]
    added = graph.call_function(operator.add, (x, residual))
    added.meta["example_value"] = sum_value
    norm = torch.ops.vllm_ir.rms_norm.default
    normed = graph.call_function(norm, (added, weight, epsilon))
    normed.meta["example_value"] = norm_value
    for user in node.users:
        env[user] = added if user.args[1] else normed
    return added


def joined_across(planned: PlannedGraph, apart: dict[fx.Node, fx.Node]) -> Collection[fx.Node]:
    """The fused ops that paths of the plan lead across. apart: by add, the op that it was."""
    between = {node for link in planned.behind for node in link.region.ops}
    return {fused for added, fused in apart.items() if added in between}

"""Why a parameter stays whole, where no pattern says so."""

from torch import fx

from fgtp_pass.graph.dataflow import GraphView
from fgtp_pass.graph.facts import Reach
from fgtp_pass.graph.normal_form import ParamMatmul
from fgtp_pass.graph.op_kinds import OpKind, op_kind, op_name, value_of
from fgtp_pass.graph.region import NoRegion, find_region


def general_reason(view: GraphView, placeholder: fx.Node) -> str:
    """Why no pattern asked for this parameter, from how the graph uses it."""
    dims = value_of(placeholder).dim()
    if dims == 1:
        owner = next((m for m in view.matmuls if m.bias is placeholder), None)
        if owner is not None:
            return f"a bias: {_matmul_reason(view, owner)}"
        return "a vector of one value per feature (a norm, a scale or a bias)"
    if dims > 2:
        what = "stacked experts, a convolution, heads in an einsum"
        return f"a parameter of {dims} dims ({what}): no component's weight"
    for matmul in view.matmuls:
        if matmul.weight is not None and matmul.weight.placeholder is placeholder:
            return _matmul_reason(view, matmul)
    if not placeholder.users:
        return "the graph does not use it"
    if any(op_kind(user) is OpKind.LOOKUP for user in placeholder.users):
        return "its lookup is not one of a plain table"
    fused = [op_name(u) for u in placeholder.users if op_kind(u) is OpKind.ATTENTION or _opaque(u)]
    if fused:
        return f"an op that does the whole layer reads it ({fused[0]})"
    return "no matmul or lookup uses it directly"


def _opaque(node: fx.Node) -> bool:
    return any(part in op_name(node) for part in ("multi_head_attention", "transformer_encoder"))


def _matmul_reason(view: GraphView, matmul: ParamMatmul) -> str:
    if matmul.node in view.adapters:
        return "a low-rank adapter: it stays whole, what it is added to may be cut"
    if matmul.node in view.adapters.values():
        return "a low-rank adapter is added to it, so it is no part of an FFN or a head by itself"
    if matmul.node in view.routers:
        return "a router: experts or tokens are chosen from its result"
    other = next((m for m in view.matmuls if view.facts[m.input].origin is matmul.node), None)
    if other is not None:
        if Reach.ATTENTION in view.reach[other.node]:
            return "feeds only another projection: the inner half of a low-rank pair or transform"
        return f"feeds only another projection: {_why_not_joined(view, other)}"
    before = view.facts[matmul.input].origin
    if before is not None and view.matmul_at(before) is not None:
        return f"reads another projection: {_why_not_joined(view, matmul)}"
    return "no component's definition fits its place in the graph"


def _why_not_joined(view: GraphView, down: ParamMatmul) -> str:
    """Why a matmul and the one in front of it are no FFN that can be cut."""
    region = find_region(view, down)
    return region.reason if isinstance(region, NoRegion) else "they are no FFN"

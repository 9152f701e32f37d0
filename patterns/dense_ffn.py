"""mlp: x -> one or two projections up -> an activation, per feature -> a projection down."""

from collections.abc import Iterator

from fgtp_pass.algebra import Cut
from fgtp_pass.dataflow import GraphView, Reach
from fgtp_pass.ops import OpKind, op_kind
from fgtp_pass.pattern import (
    Findings,
    Match,
    MatmulStage,
    Pattern,
    Refusal,
    count_depends_on_data,
)
from fgtp_pass.region import find_region

COMPONENT = "mlp"


def find(view: GraphView, found: Findings) -> Iterator[Match | Refusal]:
    """Up and down projections with nothing but an activation function between them.

    In   x -> linear(W1), linear(W3) -> silu(a) * b -> linear(W2)
    Out  Own -ag-> All x W1, W3[out/k] -> Cut, silu(a) * b at width I/k, x W2[in/k] -> Sum -rs-> Own
    """
    for down in view.matmuls:
        if down.weight is None or down.node in found.claimed:
            continue
        region = find_region(view, down)
        if isinstance(region, str):
            reads_projection = view.facts[down.input].origin in view.normal_form.matmuls
            if reads_projection and Reach.ATTENTION not in view.reach[down.node]:
                yield Refusal(down.weight.placeholder, region)
            continue
        ups = region.ups
        if any(up.weight is None or up.node in found.claimed for up in ups):
            continue
        up_weights = [up.weight for up in ups if up.weight is not None]
        weights = [*up_weights, down.weight]
        roots = {view.root(up.input) for up in ups}
        reason = (
            next((m.why_not for m in (*ups, down) if m.why_not), "")
            or count_depends_on_data(down.input)
            or _not_an_ffn(view, region.ops, len(ups), roots)
        )
        if not reason and any(w.in_features != down.weight.out_features for w in up_weights):
            reason = "it is a chain of projections that does not return to its input's width"
        if not reason and roots & view.router_sources:
            reason = "it is a shared expert or one of the experts: a router reads the same input"
        if not reason and any(view.facts[up.input].selected for up in ups):
            reason = "it is an expert: its tokens are picked by data"
        if reason:
            yield from (Refusal(weight.placeholder, reason) for weight in weights)
            continue
        first = MatmulStage(
            ups, (Cut.OUT,), tuple(len(region.blocks[up.node]) for up in ups), region
        )
        second = MatmulStage((down,), (Cut.IN,), (1,))
        yield Match(COMPONENT, (first, second), ups[0].input, down.node)


def _not_an_ffn(view: GraphView, ops: tuple, ups: int, roots: set) -> str:  # type: ignore[type-arg]
    if ups > 2 or len(roots) != 1:
        return "it joins projections of different activations"
    if not any(op_kind(op) is OpKind.POINTWISE for op in ops):
        return "it is a low-rank pair: no activation function stands between the projections"
    return ""


PATTERN = Pattern(
    COMPONENT,
    "mlp_tensor_parallel_size",
    find,
    aliases=("denseffn_tensor_parallel_size", "moe_dense_tp_size"),
)

"""mlp: x -> one or two projections up -> an activation, per feature -> a projection down."""

from collections.abc import Iterator

from fgtp_pass.pattern import (
    Cut,
    Findings,
    GraphView,
    Match,
    MatmulStage,
    NoRegion,
    OpKind,
    ParamMatmul,
    Pattern,
    Reach,
    Refusal,
    Region,
    count_depends_on_data,
    find_region,
    op_kind,
    value_of,
)

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
        if isinstance(region, NoRegion):
            if region.reads_projection and Reach.ATTENTION not in view.reach[down.node]:
                yield Refusal(down.weight.placeholder, region.reason)
            continue
        ups = region.ups
        if any(up.weight is None or up.node in found.claimed for up in ups):
            continue
        reason = next((m.why_not for m in (*ups, down) if m.why_not), "") or _not_a_dense_ffn(
            view, down, region
        )
        if reason:
            for matmul in (*ups, down):
                if matmul.weight is not None:
                    yield Refusal(matmul.weight.placeholder, reason)
            continue
        first = MatmulStage(
            ups, (Cut.OUT,), tuple(len(region.blocks[up.node]) for up in ups), region
        )
        second = MatmulStage((down,), (Cut.IN,), (1,))
        yield Match(COMPONENT, (first, second), ups[0].input, (down.node,))


def _not_a_dense_ffn(view: GraphView, down: ParamMatmul, region: Region) -> str:
    """Why matmuls joined by a region are another component, or a reason not to cut them."""
    ups, root = region.ups, view.root(region.ups[0].input)
    read = {(view.exact_root(up.input), value_of(up.input).dtype) for up in ups}
    assert down.weight is not None
    if len(ups) > 2 or len(read) > 1:
        return "it joins projections of different activations"
    if not any(op_kind(op) is OpKind.POINTWISE for op in region.ops):
        return "it is a low-rank pair: no activation function stands between the projections"
    if any(up.weight and up.weight.in_features != down.weight.out_features for up in ups):
        return "it is a chain of projections that does not return to its input's width"
    if down.node in view.routers:
        return "it is a part of a router: experts are chosen from its result"
    if root in view.router_sources or view.weighted_by_choice(down.node):
        return "it is a shared expert or one of the experts: a router reads the same input"
    if any(view.facts[up.input].selected for up in ups):
        return "it is an expert: its tokens are picked by data"
    if root.op == "placeholder" and value_of(root).dim() == 2 and not (view.cores or view.lookups):
        return "it stands alone on a list of tokens: Dynamo cuts experts out like this"
    placeholders = [m.weight.placeholder for m in (*ups, down) if m.weight]
    vectors = [*region.vectors, *(m.bias for m in (*ups, down) if m.bias is not None)]
    if len({*placeholders, *vectors}) < len(placeholders) + len(vectors):
        return "one of its parameters has two roles"
    return count_depends_on_data(down.input)


PATTERN = Pattern(
    COMPONENT,
    "mlp_tensor_parallel_size",
    find,
    aliases=("denseffn_tensor_parallel_size", "moe_dense_tp_size"),
)

"""lm_head: the matmul whose result, scaled, capped or shifted, is what the model returns."""

from collections.abc import Iterator

from fgtp_pass.pattern import (
    Cut,
    Findings,
    GraphView,
    Match,
    ParamMatmul,
    Pattern,
    Reach,
    Refusal,
    is_tensor,
    same_vocabulary,
    single_matmul,
    value_of,
)

COMPONENT = "lmhead"


def find(view: GraphView, found: Findings) -> Iterator[Match | Refusal]:
    """A matmul to the vocabulary that feeds the output and nothing else.

    In   x -> linear(W) -> scale, cap ... -> output
    Out  Own -ag-> All x W[out/k] -> Cut -a2a-> Own
    """
    candidates = [
        matmul
        for matmul in view.matmuls
        if matmul.weight is not None
        and matmul.node not in found.claimed
        and view.returned_matmul(matmul.node) is not None
        and not view.reach[matmul.node] & (Reach.ATTENTION | Reach.MATMUL)
    ]
    for matmul in candidates:
        assert matmul.weight is not None
        if _is_vocabulary(view, matmul, alone=len(candidates) == 1):
            yield single_matmul(COMPONENT, matmul, cuts=(Cut.OUT,))
        elif matmul.node not in view.routers:
            reason = f"its {matmul.weight.out_features} outputs are no vocabulary"
            yield Refusal(matmul.weight.placeholder, reason)


def _is_vocabulary(view: GraphView, matmul: ParamMatmul, alone: bool) -> bool:
    """As wide as the token table is tall; or, without a table, the widening end of some layers.

    The second rule is for a last pipeline stage. A graph that Dynamo broke inside a layer returns
    the residual stream beside its projections, or has no attention, and is told apart by that.
    """
    assert matmul.weight is not None
    width, hidden = matmul.weight.out_features, matmul.weight.in_features
    heights = [lookup.weight.in_features for lookup in view.token_tables]
    if heights:
        return same_vocabulary(width, max(heights))
    returned = [value_of(out) for out in view.outputs if is_tensor(out)]
    returns_hidden = any(
        value.dim() > 1 and value.shape[-1] == hidden and value.is_floating_point()
        for value in returned
    )
    return alone and bool(view.cores) and not returns_hidden and width > hidden


PATTERN = Pattern(COMPONENT, "lmhead_tensor_parallel_size", find, aliases=("lm_head_local_tp",))

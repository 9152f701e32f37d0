"""lm_head: the matmul whose result, scaled, capped or shifted, is what the model returns."""

from collections.abc import Iterator

from fgtp_pass.algebra import Cut
from fgtp_pass.dataflow import GraphView, Reach
from fgtp_pass.normal_form import ParamMatmul
from fgtp_pass.ops import is_tensor, value_of
from fgtp_pass.pattern import Findings, Match, Pattern, Refusal, single_matmul

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
    tables = {lookup.weight.in_features for lookup in view.lookups}
    for matmul in candidates:
        assert matmul.weight is not None
        if _is_vocabulary(view, matmul, tables, alone=len(candidates) == 1):
            yield single_matmul(COMPONENT, matmul, cuts=(Cut.OUT,))
        else:
            reason = f"its {matmul.weight.out_features} outputs are no vocabulary"
            yield Refusal(matmul.weight.placeholder, reason)


def _is_vocabulary(view: GraphView, matmul: ParamMatmul, tables: set[int], alone: bool) -> bool:
    """As wide as a table of the model; or wider than the hidden state, and the only result.

    The second rule is for a last pipeline stage, which has no table. A graph that Dynamo broke
    inside a layer returns the residual stream beside its projections, and is told apart by that.
    """
    assert matmul.weight is not None
    if matmul.weight.out_features in tables:
        return True
    hidden = matmul.weight.in_features
    returned = [value_of(out) for out in view.outputs if is_tensor(out)]
    returns_hidden = any(
        value.dim() > 1 and value.shape[-1] == hidden and value.is_floating_point()
        for value in returned
    )
    return alone and not returns_hidden and matmul.weight.out_features > hidden


PATTERN = Pattern(COMPONENT, "lmhead_tensor_parallel_size", find, aliases=("lm_head_local_tp",))

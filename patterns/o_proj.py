"""o_proj: what mixes tokens -> ops local to a token (gates, norms, scaling, clamps) -> x W."""

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
    single_matmul,
)

COMPONENT = "oproj"


def find(view: GraphView, found: Findings) -> Iterator[Match | Refusal]:
    """The one matmul that reads an attention core before the residual stream does.

    In   core -> transpose, reshape, gate, norm ... -> linear(W)
    Out  Own -a2a-> Cut x W[in/k] -> Sum -rs-> Own, or Own -ag-> All x W[out/k] -> Cut -a2a-> Own
    """
    matmuls = (m for m in view.matmuls if m.node not in view.adapters)
    readers = [m for m in matmuls if view.facts[m.input].cores]
    for matmul in readers:
        if matmul.weight is None:
            continue
        if Reach.ATTENTION in view.reach[matmul.node] and view.added(matmul.node) is None:
            continue  # q, k or v of a next layer that has no o_proj before it
        if view.returned_matmul(matmul.node) and _is_vocabulary(view, matmul):
            continue  # an lm_head right behind an attention without o_proj
        if _others(view, matmul, readers):
            # q, k and v of a next layer, or an FFN: there is no projection of the core's own
            reason = "it is one of several projections of an attention output"
            yield Refusal(matmul.weight.placeholder, reason)
            continue
        yield single_matmul(COMPONENT, matmul, cuts=(Cut.IN, Cut.OUT))


def _others(view: GraphView, matmul: ParamMatmul, readers: list[ParamMatmul]) -> bool:
    """Whether other matmuls read the same core, but for those whose results come back to it.

    A state space model makes its step sizes, inputs and outputs from its convolution's result.
    """
    cores = view.facts[matmul.input].cores
    others = {m.node for m in readers if m is not matmul and view.facts[m.input].cores & cores}
    return bool(others) and not others <= view.made_of(matmul.input)


def _is_vocabulary(view: GraphView, matmul: ParamMatmul) -> bool:
    assert matmul.weight is not None
    return any(t.weight.in_features == matmul.weight.out_features for t in view.token_tables)


PATTERN = Pattern(COMPONENT, "oproj_tensor_parallel_size", find, aliases=("o_proj_local_tp",))

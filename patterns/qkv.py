"""qkv: the projections that make queries, keys and values, whole or in two steps."""

from collections.abc import Iterator

from fgtp_pass.pattern import (
    Cut,
    Findings,
    GraphView,
    Match,
    MatmulStage,
    ParamMatmul,
    Pattern,
    Reach,
    Refusal,
    by_activation,
    count_depends_on_data,
)

COMPONENT = "qkv"


def find(view: GraphView, found: Findings) -> Iterator[Match | Refusal]:
    """The matmuls whose results reach an attention core, those that read one activation as one.

    In   x -> linear(Wq), linear(Wk), linear(Wv) -> heads, rotation -> core
    Out  Own -ag-> All x Wq, Wk, Wv[out/k] -> Cut -a2a-> Own

    Fused ones, also with an FFN's projection up in them, are cut as they are; so are the halves of
    low-rank pairs. Every rank has all features of its own tokens again, so heads do not matter.
    """
    feeding: list[ParamMatmul] = []
    for matmul in view.matmuls:
        if matmul.weight is None or matmul.node in found.claimed | view.routers:
            continue
        if matmul.node in view.adapters:
            continue
        if Reach.ATTENTION not in view.reach[matmul.node] and not _is_latent(view, matmul):
            continue
        reason = matmul.why_not or count_depends_on_data(matmul.input)
        if reason:
            yield Refusal(matmul.weight.placeholder, reason)
        else:
            feeding.append(matmul)
    for matmuls in by_activation(view, feeding):
        stage = MatmulStage(tuple(matmuls), (Cut.OUT,), (1,) * len(matmuls))
        yield Match(COMPONENT, (stage,), matmuls[0].input, tuple(m.node for m in matmuls))


def _is_latent(view: GraphView, matmul: ParamMatmul) -> bool:
    """Whether all that reads it are projections that reach a core: a low-rank pair's first half."""
    readers = [m for m in view.matmuls if view.facts[m.input].origin is matmul.node]
    return (
        bool(readers)
        and view.reach[matmul.node] == Reach.MATMUL
        and all(Reach.ATTENTION in view.reach[m.node] for m in readers)
    )


PATTERN = Pattern(COMPONENT, "qkv_tensor_parallel_size", find, opt_in=True)

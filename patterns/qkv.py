"""qkv: the projections that make queries, keys and values, whole or in two steps."""

from collections.abc import Iterator

import torch
from torch import fx

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
    count_depends_on_data,
    value_of,
)

COMPONENT = "qkv"


def find(view: GraphView, found: Findings) -> Iterator[Match | Refusal]:
    """The matmuls whose results reach an attention core, those that read one activation as one.

    In   x -> linear(Wq), linear(Wk), linear(Wv) -> heads, rotation -> core
    Out  Own -ag-> All x Wq, Wk, Wv[out/k] -> Cut -a2a-> Own

    Fused ones, also with an FFN's projection up in them, are cut as they are; so are the halves of
    low-rank pairs. Every rank has all features of its own tokens again, so heads do not matter.
    """
    by_input: dict[tuple[fx.Node, torch.dtype, torch.dtype], list[ParamMatmul]] = {}
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
            continue
        dtypes = value_of(matmul.input).dtype, value_of(matmul.node).dtype
        by_input.setdefault((view.exact_root(matmul.input), *dtypes), []).append(matmul)
    for matmuls in by_input.values():
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

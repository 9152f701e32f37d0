"""mlp: x -> one or two projections up -> an activation, per feature -> a projection down."""

from collections.abc import Iterator

from torch import fx

from fgtp_pass.pattern import (
    FeedForward,
    Findings,
    GraphView,
    Match,
    Pattern,
    Refusal,
    feed_forwards,
    op_name,
    tensor_inputs,
    value_of,
)

COMPONENT = "mlp"


def find(view: GraphView, found: Findings) -> Iterator[Match | Refusal]:
    """Up and down projections with nothing but an activation function between them.

    In   x -> linear(W1), linear(W3) -> silu(a) * b -> linear(W2)
    Out  Own -ag-> All x W1, W3[out/k] -> Cut, silu(a) * b at width I/k, x W2[in/k] -> Sum -rs-> Own
    """
    for ffn in feed_forwards(view, found):
        if isinstance(ffn, Refusal):
            yield ffn
            continue
        reason = ffn.why_not or _not_dense(view, ffn) or ffn.why_whole
        if reason:
            yield from ffn.refused(reason)
        else:
            yield ffn.match(COMPONENT)


def _not_dense(view: GraphView, ffn: FeedForward) -> str:
    """Why an FFN is another component's, or an expert's."""
    root = view.root(ffn.input)
    if ffn.down.node in view.routers:
        return "it is a part of a router: experts are chosen from its result"
    if root in view.router_sources or view.weighted_by_choice(ffn.down.node):
        return "it is an expert, a chosen or a shared one: a router reads the same input"
    if _picked_by_router(view, root):
        return "it is an expert: a router's choice scales what it reads"
    if view.facts[ffn.input].selected:
        return "it is an expert: its tokens are picked by data"
    if root.op == "placeholder" and value_of(root).dim() == 2 and not (view.cores or view.lookups):
        return "it stands alone on a list of tokens: Dynamo cuts experts out like this"
    return ""


def _picked_by_router(view: GraphView, node: fx.Node) -> bool:
    """Whether the value is an activation times what was chosen from a router's result."""
    factors = [view.facts[n] for n in tensor_inputs(node)] if op_name(node) == "mul" else []
    return any(facts.chosen and facts.origin in view.routers for facts in factors)


PATTERN = Pattern(
    COMPONENT,
    "mlp_tensor_parallel_size",
    find,
    aliases=("denseffn_tensor_parallel_size", "moe_dense_tp_size"),
)

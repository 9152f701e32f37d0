"""sharedexpert: the dense FFN that every token passes beside experts that a router chooses."""

from collections.abc import Iterator

from fgtp_pass.pattern import (
    FeedForward,
    Findings,
    GraphView,
    Match,
    Pattern,
    Refusal,
    feed_forwards,
)

COMPONENT = "sharedexpert"


def find(view: GraphView, found: Findings) -> Iterator[Match | Refusal]:
    """An FFN on what a router reads, weighted by no choice of the router's.

    In   x -> linear(W1), linear(W3) -> silu(a) * b -> linear(W2), [x sigmoid(gate)], + experts(x)
    Out  Own -ag-> All x W1, W3[out/k] -> Cut, silu(a) * b at width I/k, x W2[in/k] -> Sum -rs-> Own

    It ends in the rank's own tokens, so whatever adds it to the experts' results adds it once.
    """
    for ffn in feed_forwards(view, found):
        if isinstance(ffn, Refusal) or ffn.why_not or not _is_shared(view, ffn):
            continue
        if ffn.why_whole:
            yield from ffn.refused(ffn.why_whole)
        else:
            yield ffn.match(COMPONENT)


def _is_shared(view: GraphView, ffn: FeedForward) -> bool:
    """Whether a router reads the same input, and every token passes with a weight of its own."""
    return (
        view.root(ffn.input) in view.router_sources
        and not view.weighted_by_choice(ffn.down.node)
        and ffn.down.node not in view.routers
        and not view.facts[ffn.input].selected
    )


PATTERN = Pattern(COMPONENT, "sharedexpert_tensor_parallel_size", find, opt_in=True)

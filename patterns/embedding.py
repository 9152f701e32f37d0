"""embedding: token ids, as the caller gave them -> rows of a table as tall as the vocabulary."""

from collections.abc import Iterator

from fgtp_pass.dataflow import GraphView
from fgtp_pass.normal_form import Lookup
from fgtp_pass.pattern import (
    Findings,
    LookupStage,
    Match,
    Pattern,
    Refusal,
    count_depends_on_data,
)

COMPONENT = "embedding"


def find(view: GraphView, found: Findings) -> Iterator[Match | Refusal]:
    """A lookup by token ids; positions and segments are told apart by origin and by height.

    In   ids -> embedding(W)
    Out  ids Own -ag-> All, masked lookup in W[rows/k] -> Sum -rs-> Own
    """
    by_ids = [lookup for lookup in view.lookups if view.facts[lookup.ids].token_ids]
    for lookup in view.lookups:
        if lookup not in by_ids:
            reason = "its rows are looked up by computed positions or segments, not by token ids"
        elif not _is_vocabulary(lookup, by_ids, found):
            reason = f"its {lookup.weight.in_features} rows are no vocabulary"
        else:
            reason = lookup.why_not or count_depends_on_data(lookup.ids)
        if reason:
            yield Refusal(lookup.weight.placeholder, reason)
        else:
            yield Match(COMPONENT, (LookupStage(lookup),), lookup.ids, lookup.node)


def _is_vocabulary(lookup: Lookup, by_ids: list[Lookup], found: Findings) -> bool:
    """As tall as an lm_head is wide (or padded); without an lm_head, the tallest table."""
    rows = lookup.weight.in_features
    heads = [
        matmul.weight.out_features
        for match in found.of("lmhead")
        for stage in match.stages
        if not isinstance(stage, LookupStage)
        for matmul in stage.matmuls
        if matmul.weight is not None
    ]
    if heads:
        return any(head <= rows <= 2 * head for head in heads)
    return rows == max(other.weight.in_features for other in by_ids)


PATTERN = Pattern(COMPONENT, "embedding_tensor_parallel_size", find)

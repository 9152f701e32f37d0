"""embedding: token ids, as the caller gave them -> rows of a table as tall as the vocabulary."""

from collections.abc import Iterator

from fgtp_pass.pattern import (
    Findings,
    GraphView,
    Lookup,
    LookupStage,
    Match,
    Pattern,
    Refusal,
    count_depends_on_data,
    same_vocabulary,
    tensor_inputs,
    value_of,
)

COMPONENT = "embedding"

# Without an lm_head to compare with, a vocabulary is this much taller than positions or segments.
_MUCH_TALLER = 4


def find(view: GraphView, found: Findings) -> Iterator[Match | Refusal]:
    """A lookup by token ids; positions and segments are told apart by origin and by height.

    In   ids -> embedding(W)
    Out  ids Own -ag-> All, masked lookup in W[rows/k] -> Sum -rs-> Own
    """
    heads = [
        matmul.weight.out_features
        for match in found.of("lmhead")
        for stage in match.stages
        if not isinstance(stage, LookupStage)
        for matmul in stage.matmuls
        if matmul.weight is not None
    ]
    for lookup in view.lookups:
        if not view.facts[lookup.ids].token_ids:
            reason = "its rows are looked up by computed positions or choices, not by token ids"
        else:
            reason = (
                _not_the_vocabulary(view, lookup, heads)
                or lookup.why_not
                or count_depends_on_data(lookup.ids)
            )
        if reason:
            yield Refusal(lookup.weight.placeholder, reason)
        else:
            yield Match(COMPONENT, (LookupStage(lookup),), lookup.ids, (lookup.node,))


def _not_the_vocabulary(view: GraphView, lookup: Lookup, heads: list[int]) -> str:
    """Tables of positions and segments can be looked up by the caller's integers as well."""
    rows = lookup.weight.in_features
    others = [t.weight.in_features for t in view.token_tables if t.weight.in_features != rows]
    if rows in heads:
        return ""
    if _joins_given_embeddings(view, lookup):
        return "it is added to embeddings that the caller gave: a table of positions or segments"
    if heads:
        padded = not set(others) & set(heads) and any(same_vocabulary(rows, h) for h in heads)
        return "" if padded else f"its {rows} rows are no vocabulary"
    if any(rows < _MUCH_TALLER * other for other in others):
        return "several tables are looked up by the caller's integers, none much taller"
    return ""


def _joins_given_embeddings(view: GraphView, lookup: Lookup) -> bool:
    for user in lookup.node.users:
        for n in tensor_inputs(user):
            origin = view.facts[n].origin
            if origin is not None and origin.op == "placeholder" and n is not lookup.node:
                return bool(value_of(origin).is_floating_point())
    return False


PATTERN = Pattern(COMPONENT, "embedding_tensor_parallel_size", find)

"""The components of a decoder that can be sharded by themselves, one definition per file.

A pattern sees what the ones before it have claimed, so the order is part of the definition: an
FFN's down projection may reach the output of a model without a head, and is no lm_head then; and
what is left of attention's projections is qkv.

What they are made of comes from `fgtp_pass.pattern`, as for patterns that are not built in.

May import: algebra, graph, detect.
May be imported by: options, dry_run, models, vllm.
"""

from collections.abc import Sequence

from fgtp_pass.pattern import Pattern
from fgtp_pass.patterns import dense_ffn, embedding, lm_head, o_proj, qkv, shared_expert

BUILTIN: tuple[Pattern, ...] = (
    o_proj.PATTERN,
    dense_ffn.PATTERN,
    lm_head.PATTERN,
    embedding.PATTERN,
    shared_expert.PATTERN,
    qkv.PATTERN,
)


def with_own(patterns: Sequence[Pattern]) -> tuple[Pattern, ...]:
    """The built-in patterns and a user's, in the order to run them: what is opt-in comes last."""
    usual = (pattern for pattern in BUILTIN if not pattern.opt_in)
    return (*usual, *patterns, *(pattern for pattern in BUILTIN if pattern.opt_in))

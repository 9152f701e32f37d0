"""What the author of a pattern works with, from one place: see docs/patterns.md."""

from fgtp_pass.algebra.placement import Cut
from fgtp_pass.detect.feed_forward import FeedForward, feed_forwards
from fgtp_pass.detect.match import (
    Findings,
    LookupStage,
    Match,
    MatmulStage,
    Pattern,
    Refusal,
    by_activation,
    count_depends_on_data,
    same_vocabulary,
    single_matmul,
)
from fgtp_pass.graph.dataflow import GraphView
from fgtp_pass.graph.facts import Facts, Reach
from fgtp_pass.graph.normal_form import Lookup, ParamMatmul, Weight
from fgtp_pass.graph.op_kinds import OpKind, is_tensor, op_kind, op_name, tensor_inputs, value_of
from fgtp_pass.graph.region import NoRegion, Region, find_region

__all__ = [
    "Cut",
    "Facts",
    "FeedForward",
    "Findings",
    "GraphView",
    "Lookup",
    "LookupStage",
    "Match",
    "MatmulStage",
    "NoRegion",
    "OpKind",
    "ParamMatmul",
    "Pattern",
    "Reach",
    "Refusal",
    "Region",
    "Weight",
    "by_activation",
    "count_depends_on_data",
    "feed_forwards",
    "find_region",
    "is_tensor",
    "op_kind",
    "op_name",
    "same_vocabulary",
    "single_matmul",
    "tensor_inputs",
    "value_of",
]

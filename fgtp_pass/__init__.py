"""Fine-grained tensor parallelism as a compiler pass. See README.md."""

from fgtp_pass.backend import fgtp_backend
from fgtp_pass.errors import (
    AgreementError,
    ConfigError,
    DetectionError,
    FgtpError,
    InferenceOnlyError,
    ShardedWeightError,
    TokenCountError,
)
from fgtp_pass.pattern import Pattern
from fgtp_pass.plan import Plan
from fgtp_pass.planning import GraphSnapshot, make_plan, snapshot_graphs
from fgtp_pass.step import idle_step
from fgtp_pass.weights import applied_plan, full_state_dict, shard_state_dict, unshard

__all__ = [
    "AgreementError",
    "ConfigError",
    "DetectionError",
    "FgtpError",
    "GraphSnapshot",
    "InferenceOnlyError",
    "Pattern",
    "Plan",
    "ShardedWeightError",
    "TokenCountError",
    "applied_plan",
    "fgtp_backend",
    "full_state_dict",
    "idle_step",
    "make_plan",
    "shard_state_dict",
    "snapshot_graphs",
    "unshard",
]

"""Fine-grained tensor parallelism as a compiler pass. See README.md.

Names are imported when they are first used, so that `fgtp --help` need not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_HOME = {
    "AgreementError": "errors",
    "ConfigError": "errors",
    "DetectionError": "errors",
    "FgtpError": "errors",
    "GraphSnapshot": "planning",
    "InferenceOnlyError": "errors",
    "Pattern": "pattern",
    "Plan": "plan",
    "ShardedWeightError": "errors",
    "TokenCountError": "errors",
    "applied_plan": "weights",
    "fgtp_backend": "backend",
    "full_state_dict": "weights",
    "idle_step": "step",
    "make_plan": "planning",
    "shard_state_dict": "weights",
    "snapshot_graphs": "planning",
    "unshard": "weights",
}

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


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"fgtp_pass.{_HOME[name]}"), name)

"""Fine-grained tensor parallelism as a compiler pass. See README.md.

Names are imported when they are first used, so that `fgtp --help` need not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fgtp_pass.backend.backend import fgtp_backend
    from fgtp_pass.checkpoint.empty_model import init_empty_weights
    from fgtp_pass.checkpoint.load import load_checkpoint
    from fgtp_pass.checkpoint.save import save_checkpoint
    from fgtp_pass.checkpoint.update import update_weights
    from fgtp_pass.dry_run.make_plan import make_plan
    from fgtp_pass.dry_run.snapshot import GraphSnapshot, snapshot_graphs
    from fgtp_pass.errors import (
        AgreementError,
        CheckpointError,
        ConfigError,
        DetectionError,
        FgtpError,
        InferenceOnlyError,
        ShardedWeightError,
        TokenCountError,
    )
    from fgtp_pass.pattern import Pattern
    from fgtp_pass.plan.plan import Plan
    from fgtp_pass.step.idle_step import idle_step
    from fgtp_pass.weights.state import applied_plan, full_state_dict, shard_state_dict, unshard

_HOME = {
    "AgreementError": "errors",
    "CheckpointError": "errors",
    "ConfigError": "errors",
    "DetectionError": "errors",
    "FgtpError": "errors",
    "GraphSnapshot": "dry_run.snapshot",
    "InferenceOnlyError": "errors",
    "Pattern": "pattern",
    "Plan": "plan.plan",
    "ShardedWeightError": "errors",
    "TokenCountError": "errors",
    "applied_plan": "weights.state",
    "fgtp_backend": "backend.backend",
    "full_state_dict": "weights.state",
    "idle_step": "step.idle_step",
    "init_empty_weights": "checkpoint.empty_model",
    "load_checkpoint": "checkpoint.load",
    "make_plan": "dry_run.make_plan",
    "save_checkpoint": "checkpoint.save",
    "shard_state_dict": "weights.state",
    "snapshot_graphs": "dry_run.snapshot",
    "unshard": "weights.state",
    "update_weights": "checkpoint.update",
}

__all__ = [
    "AgreementError",
    "CheckpointError",
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
    "init_empty_weights",
    "load_checkpoint",
    "make_plan",
    "save_checkpoint",
    "shard_state_dict",
    "snapshot_graphs",
    "unshard",
    "update_weights",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"fgtp_pass.{_HOME[name]}"), name)

"""Deployments of shipped models, for tests of the cost model."""

from typing import Any

from fgtp_pass.cost.hardware import load
from fgtp_pass.cost.layout import Deployment, Load
from fgtp_pass.cost.model_summary import ModelSummary

GIB = 2**30


def of(
    summary: ModelSummary,
    hardware: str,
    sequences: int,
    input_tokens: int = 4096,
    **keywords: Any,
) -> Deployment:
    device = load(hardware)
    asked = Load(sequences, input_tokens, **{"scheme": summary.scheme, **keywords})
    return Deployment(summary, device, asked, device.devices_per_node)

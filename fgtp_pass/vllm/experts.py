"""Experts, and the FFN beside them: how planning sees them, and when a sharded one runs.

vLLM runs a layer of experts, shared ones included, in one opaque op, whose inside is no graph. A
shared expert is there like an FFN of a model without a graph: see `stretch`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from vllm.model_executor.layers.fused_moe.runner.shared_experts import (
    SharedExperts,
    SharedExpertsOrder,
)

_library: Any = torch.library.Library("fgtp", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("moe(Tensor x, Tensor weights, Tensor experts) -> Tensor")


def _moe_shape(x: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


torch.library.register_fake("fgtp::moe", _moe_shape, lib=_library)


def traced_experts(
    self: Any,
    hidden_states: torch.Tensor,
    router_logits: torch.Tensor,
    input_ids: torch.Tensor | None = None,
    shared_experts_input: torch.Tensor | None = None,
) -> torch.Tensor:
    """`MoERunner.forward` for planning: a choice, its experts as one op, and the shared ones as the
    model has them.
    """
    x = hidden_states if shared_experts_input is None else shared_experts_input
    gate = getattr(self.gate, "weight", None)
    if gate is not None:  # the model leaves its router to the runner
        router_logits = F.linear(hidden_states.to(gate.dtype), gate)
    weights, experts = torch.topk(router_logits, 1)
    out: torch.Tensor = torch.ops.fgtp.moe(x, weights, experts)
    return out if self.shared_experts is None else self.shared_experts._layer(x) + out


def run_in_order(model: nn.Module) -> None:
    """Let sharded shared experts run before the routed ones, on the same stream.

    On a stream beside it, their collectives could meet those of the routed experts in another order
    on each rank's device.
    """
    for module in model.modules():
        if isinstance(module, SharedExperts) and any(hasattr(m, "fgtp") for m in module.modules()):
            module._determine_shared_experts_order = _before_routed


def _before_routed(hidden_states: torch.Tensor) -> SharedExpertsOrder:
    return SharedExpertsOrder.NO_OVERLAP

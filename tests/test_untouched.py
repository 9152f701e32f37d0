"""A model without a match comes out node for node identical, at the inner backend's speed."""

from typing import Any

import torch
from decoding import sizes
from ranks import Pools
from torch import fx, nn

import fgtp_pass
from fgtp_pass import fgtp_backend
from fgtp_pass.graph.text import graph_text


class NoComponent(nn.Module):
    """Convolutions: nothing that a decoder component could be."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv1d(16, 32, 3, padding=1), nn.ReLU(), nn.Conv1d(32, 16, 3, padding=1)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x).softmax(-1)


@torch.no_grad()
def _untouched() -> None:
    model, x = NoComponent(), torch.randn(8, 16, 128)
    seen: list[fx.GraphModule] = []

    def inner(gm: fx.GraphModule, inputs: Any) -> Any:
        seen.append(gm)
        return gm.forward

    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        text, nodes = graph_text(gm.graph), list(gm.graph.nodes)
        options = {
            "finegrained_tp_config": sizes(2),
            "allow_missing": ["embedding", "lmhead", "oproj", "mlp"],
            "inner_backend": inner,
        }
        compiled = fgtp_backend(gm, inputs, options=options)
        assert seen[0] is gm
        assert list(gm.graph.nodes) == nodes
        assert graph_text(gm.graph) == text
        assert compiled == gm.forward, "no wrapper around the inner backend's callable"
        return compiled

    fast = torch.compile(model, backend=backend)
    assert torch.equal(fast(x), model(x))
    assert fgtp_pass.applied_plan(model) is None


def test_model_without_a_match_is_untouched(ranks: Pools) -> None:
    ranks(2).run(_untouched)

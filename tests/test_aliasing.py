"""Whose memory a value shares, and what may change it: no read of a site moves past a write."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from marks import quick
from torch import nn

import fgtp_pass

pytestmark = quick


class ScaledFFN(nn.Module):
    """An FFN that divides its inner features by a buffer, which `update` may change before down."""

    def __init__(self, update: Callable[[Any, torch.Tensor], Any]):
        super().__init__()
        self.emb = nn.Embedding(40, 8)
        self.up, self.down = nn.Linear(8, 12, bias=False), nn.Linear(12, 8, bias=False)
        self.register_buffer("history", torch.ones(4))
        self.register_buffer("scale", self.history[3])  # a view: the same memory
        self.register_buffer("other", torch.ones(4))
        self.update = update

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.up(self.emb(ids)) / self.scale)
        self.update(self, h)
        return self.down(h)


def is_cut(update: Callable[[Any, torch.Tensor], Any]) -> bool:
    plan = fgtp_pass.make_plan(
        ScaledFFN(update).eval(),
        (torch.zeros(2, 3, dtype=torch.long),),
        finegrained_tp_config={"mlp_tensor_parallel_size": 2},
        data_parallel_size=2,
        allow_missing=["mlp"],
    )
    return bool(plan.sites)


@torch.library.custom_op("fgtp_test::grow", mutates_args={"x"})
def grow(x: torch.Tensor) -> None:
    x.mul_(2.0)


@torch.library.custom_op("fgtp_test::largest", mutates_args=())
def largest(x: torch.Tensor) -> torch.Tensor:
    return x.max()


grow.register_fake(lambda x: None)
largest.register_fake(lambda x: x.new_empty(()))

CHANGES = {
    "method": lambda m, h: m.scale.mul_(0.5),
    "operator": lambda m, h: m.scale.__itruediv__(2),
    "set_item": lambda m, h: m.history.__setitem__(3, 2.0),
    "another_view": lambda m, h: m.history.view(2, 2).add_(1.0),
    "data": lambda m, h: m.history.data.add_(1.0),
    "out": lambda m, h: torch.max(m.other, out=m.scale),
    "foreach": lambda m, h: torch._foreach_add_([m.other, m.history], 1.0),
    "custom_op": lambda m, h: grow(m.history),
    "statistics": lambda m, h: torch.nn.functional.batch_norm(
        m.other.expand(2, 4), m.history, m.other, training=True
    ),
}
LEAVES = {
    "nothing": lambda m, h: None,
    "another_buffer": lambda m, h: m.other.mul_(2.0),
    "custom_op_that_reads": lambda m, h: largest(m.history),
    "a_copy": lambda m, h: m.history.clone().mul_(2.0),
    "cumsum": lambda m, h: m.history.cumsum(0),
    "data_read": lambda m, h: m.history.data + 1.0,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_changed_operand_keeps_the_site_whole(change: Any) -> None:
    assert not is_cut(change)


@pytest.mark.parametrize("leave", LEAVES.values(), ids=LEAVES.keys())
def test_an_operand_that_stays_does_not(leave: Any) -> None:
    assert is_cut(leave)

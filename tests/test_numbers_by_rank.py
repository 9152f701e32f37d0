"""What ranks compute on each other's tokens must be the same on all: numbers, constants, code."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import Pools
from torch import nn

import fgtp_pass
from fgtp_pass import fgtp_backend

_OPTIONS: dict[str, Any] = {
    "inner_backend": "eager",
    "timeout_seconds": 60,
    "allow_missing": ["mlp"],
    "finegrained_tp_config": {"oproj_tensor_parallel_size": 2, "mlp_tensor_parallel_size": 2},
}


class Scaled(nn.Module):
    """An FFN whose inner features, or a layer whose residual stream, the caller scales."""

    def __init__(self, inside: bool):
        super().__init__()
        self.inside = inside
        self.o, self.norm = nn.Linear(8, 8, bias=False), nn.RMSNorm(8, eps=1e-6)
        self.up, self.down = nn.Linear(8, 12, bias=False), nn.Linear(12, 8, bias=False)

    def forward(self, x: torch.Tensor, scale: float) -> torch.Tensor:
        x = x + self.o(F.scaled_dot_product_attention(x, x, x))
        y = self.norm(x) if self.inside else self.norm(x * scale + 1)
        y = F.gelu(self.up(y))
        return x + self.down(y * scale if self.inside else y)


class Counting(Scaled):
    """It scales by a buffer of its own, which each step changes."""

    def __init__(self, inside: bool, read: str):
        super().__init__(inside)
        self.read = read
        self.register_buffer("kept", torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = {
            "itself": lambda: self.kept[3],
            "a value made of it": lambda: self.kept[3] * 0.5,
        }[self.read]()
        out = super().forward(x, scale)
        self.kept.mul_(1.5)
        return out


def _one_idles(inside: bool, read: str) -> float:
    """Rank 1 idles in every other step, and so does not change its buffer."""
    torch.manual_seed(0)
    model, whole = (Counting(inside, read).eval().requires_grad_(False) for _ in range(2))
    whole.load_state_dict(model.state_dict())
    fast = torch.compile(model, backend=fgtp_backend, options=_OPTIONS)
    worst = 0.0
    with torch.no_grad():
        for step in range(4):
            if dist.get_rank() == 1 and step % 2:
                fgtp_pass.idle_step(fast)
                continue
            x = torch.randn(2, 8)
            worst = max(worst, float((fast(x) - whole(x)).abs().max()))
    return worst


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("read", ["itself", "a value made of it"])
def test_buffers_that_an_idle_rank_does_not_change(ranks: Pools, inside: bool, read: str) -> None:
    assert max(ranks(2).run(_one_idles, inside, read)) <= 1e-5


def _compare(inside: bool, dynamic: bool | None) -> float:
    torch.manual_seed(0)
    model = Scaled(inside).eval().requires_grad_(False)
    rank = dist.get_rank()
    calls = [(torch.randn(2, 8), 0.5 + rank + step) for step in range(3)]
    with torch.no_grad():
        want = [model(*call) for call in calls]
        fast = torch.compile(model, backend=fgtp_backend, options=_OPTIONS, dynamic=dynamic)
        got = [fast(*call) for call in calls]
    return max(float((a - b).abs().max()) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("inside", [True, False])
def test_numbers_that_a_graph_is_given(ranks: Pools, inside: bool) -> None:
    """Each rank has another: they are no part of what runs on the tokens of others."""
    assert max(ranks(2).run(_compare, inside, True)) <= 1e-5


@pytest.mark.parametrize("inside", [True, False])
def test_numbers_that_are_compiled_in(ranks: Pools, inside: bool) -> None:
    """As constants they are part of the plan, which ranks compare."""
    for outcome in ranks(2).outcomes(_compare, inside, None):
        assert outcome.error == "AgreementError", outcome.trace
        assert "differ in plan" in outcome.message


def test_plans_differ_by_constants_in_what_others_compute() -> None:
    plans = []
    for scale in (0.5, 0.25):
        model = Scaled(True).eval()
        plans.append(
            fgtp_pass.make_plan(
                lambda x, m=model, s=scale: m(x, s), (torch.zeros(3, 8),), data_parallel_size=2
            )
        )
    assert plans[0].fingerprint != plans[1].fingerprint

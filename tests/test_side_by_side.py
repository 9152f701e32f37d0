"""Matmuls side by side on one activation: one site with several outputs and one collective each."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from decoding import relative_errors
from marks import quick
from ranks import Pools
from torch import Tensor, nn

import fgtp_pass
from fgtp_pass import fgtp_backend
from fgtp_pass.pattern import Cut, Findings, GraphView, Match, MatmulStage, Pattern

pytestmark = quick

WIDTH = 10
OUTPUTS = (6, 5, 7)  # two ranks divide one of them


def pattern(*cuts: Cut) -> Pattern:
    """All matmuls of the graph as one site."""

    def find(view: GraphView, found: Findings) -> Iterator[Match]:
        matmuls = tuple(view.matmuls)
        stage = MatmulStage(matmuls, cuts, (1,) * len(matmuls))
        yield Match("three", (stage,), matmuls[0].input, tuple(m.node for m in matmuls))

    return Pattern("three", "three_size", find)


PATTERNS = {cut: pattern(cut) for cut in (Cut.OUT, Cut.IN)}


class Three(nn.Module):
    """Three projections, and what is done with their results."""

    def __init__(self, body: Callable[["Three", Tensor], Tensor]):
        super().__init__()
        torch.manual_seed(0)
        biases = (True, False, True)
        self.a, self.b, self.c = (
            nn.Linear(WIDTH, out, bias=bias) for out, bias in zip(OUTPUTS, biases, strict=True)
        )
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def used_in_between(m: Three, x: Tensor) -> Tensor:
    """The first result is used before the last matmul, written into and viewed as a vector."""
    a = m.a(x)
    a = a.mul_(2.0).view(-1).square().sum() + x.mean()
    b, c = m.b(x.flatten(0, 1)), m.c(x)
    return torch.cat([b.view(-1) + a, c.relu_().view(-1)])


def changed_in_between(m: Three, x: Tensor) -> Tensor:
    x = x * 1
    a = m.a(x)
    x.add_(1.0)
    return torch.cat([a, m.b(x), m.c(x)], -1)


def changed_through_a_view(m: Three, x: Tensor) -> Tensor:
    x = x * 1
    a, b = m.a(x), m.b(x)
    x.view(-1)[:3].zero_()
    return torch.cat([a, b, m.c(x)], -1)


def copied_before_a_change(m: Three, x: Tensor) -> Tensor:
    x = x * 1
    before = x.double()
    x.mul_(3.0)
    return torch.cat([m.a(x), m.b(before.float()), m.c(x)], -1)


def tokens_of(rank: int, ragged: bool) -> Tensor:
    return torch.randn(
        2, 3 + 2 * rank * ragged, WIDTH, generator=torch.Generator().manual_seed(rank)
    )


@torch.no_grad()
def _run(body: Callable[[Three, Tensor], Tensor], cut: Cut, tokens: str) -> tuple[float, int]:
    """Its error, and the collectives of a step: 0 where it is left whole."""
    rank, model = dist.get_rank(), Three(body)
    x = tokens_of(rank, tokens == "ragged")
    want = model(x.clone())
    options = {
        "finegrained_tp_config": {"three_size": 2},
        "inner_backend": "eager",
        "tokens": tokens,
        "patterns": [PATTERNS[cut]],
        "allow_missing": ["three"],
    }
    fast = torch.compile(model, backend=fgtp_backend, options=options)
    error = relative_errors(fast(x.clone()), want)[0]
    plan = fgtp_pass.applied_plan(fast)
    if plan is not None:  # one rank has no tokens
        if rank == 0:
            error = max(error, relative_errors(fast(x.clone()), want)[0])
        else:
            fgtp_pass.idle_step(fast)
    return error, plan.collectives_per_step if plan else 0


@pytest.mark.parametrize("cut", [Cut.OUT, Cut.IN], ids=lambda cut: cut.value)
@pytest.mark.parametrize("tokens", ["equal", "ragged"])
def test_they_share_their_collectives(ranks: Pools, cut: Cut, tokens: str) -> None:
    for error, collectives in ranks(2).run(_run, used_in_between, cut, tokens):
        assert error < 1e-5
        assert collectives == 2


@pytest.mark.parametrize(
    "body", [changed_in_between, changed_through_a_view, copied_before_a_change]
)
def test_none_is_computed_where_it_would_read_another_value(
    ranks: Pools, body: Callable[[Three, Tensor], Tensor]
) -> None:
    for error, collectives in ranks(2).run(_run, body, Cut.OUT, "equal"):
        assert error < 1e-5
        assert collectives == 0
    plan = fgtp_pass.make_plan(
        Three(body),
        (tokens_of(0, False),),
        finegrained_tp_config={"three_size": 2},
        data_parallel_size=2,
        patterns=[PATTERNS[Cut.OUT]],
        allow_missing=["three"],
    )
    assert {left.fqn for left in plan.left_alone} == {n for n, _ in Three(body).named_parameters()}
    assert all("changed in place" in left.reason for left in plan.left_alone)

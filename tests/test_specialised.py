"""Dynamo makes a batch of 1, or 1 token, a number: such a rank's graph must go with the others'."""

from abc import ABC, abstractmethod
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from decoding import relative_errors, sizes
from ranks import Pools
from torch import nn

import fgtp_pass
from fgtp_pass import fgtp_backend

COMPONENTS = ("embedding", "lmhead", "oproj", "mlp")


class Toy(nn.Module, ABC):
    """An embedding, something between, and an lm_head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(64, 16)
        self.qkv = nn.Linear(16, 48)
        self.up = nn.Linear(16, 32)
        self.down = nn.Linear(32, 16)
        self.head = nn.Linear(16, 64)

    @abstractmethod
    def between(self, x: torch.Tensor) -> torch.Tensor: ...

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.between(self.table(ids)))
        return logits


class FlatUp(Toy):
    """The up projection reads flat tokens, the down projection those of each sequence."""

    def between(self, x: torch.Tensor) -> torch.Tensor:
        up = self.up(x.reshape(-1, 16)).view(*x.shape[:-1], 32)
        return x + self.down(F.relu(up))


class Attention(Toy):
    """o_proj reads flat tokens, every other one; its result has sizes of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.o = nn.Linear(16, 16)

    def between(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x[:, ::2])[:, None].chunk(3, -1)
        a = F.scaled_dot_product_attention(q, k, v)[:, 0]
        return torch.tanh(self.o(a.reshape(-1, 16)).view(a.shape))


class MeanOfTokens(Toy):
    """What is added to the FFN's result is one per sequence: with 1 token as many as tokens."""

    def between(self, x: torch.Tensor) -> torch.Tensor:
        mean = x.mean(1, keepdim=True)
        return self.down(F.relu(self.up(x))) + mean


MODELS = {"flat up": FlatUp, "flat attention": Attention, "mean of tokens": MeanOfTokens}
SHAPES = {"one sequence": (1, 6), "one token": (3, 1), "one of both": (1, 1), "more": (2, 6)}


@pytest.mark.parametrize("model", ["flat up", "flat attention"])
def test_the_plan_does_not_depend_on_what_is_one(model: str) -> None:
    plans = {}
    for name, shape in SHAPES.items():
        torch._dynamo.reset()
        ids = torch.zeros(shape, dtype=torch.long)
        for dim in (0, 1):
            torch._dynamo.maybe_mark_dynamic(ids, dim)
        config = sizes(2)
        plans[name] = fgtp_pass.make_plan(
            MODELS[model](),
            (ids,),
            finegrained_tp_config=config,
            data_parallel_size=2,
            allow_missing=COMPONENTS,
        )
    assert len(plans["more"].sites) == 3
    assert {name for name, plan in plans.items() if plan.sites != plans["more"].sites} == set()


@torch.no_grad()
def _as_unsharded(name: str, calls: list[list[tuple[int, int]]], **how: Any) -> list[float]:
    """The worst error of each call; calls: for each, the shape of the ids by rank."""
    model, rank = MODELS[name](), dist.get_rank()
    shapes = [shape[rank] for shape in calls]
    given = [
        torch.randint(64, shape, generator=torch.Generator().manual_seed(i))
        for i, shape in enumerate(shapes)
    ]
    want = [model(ids) for ids in given]
    options = {
        "finegrained_tp_config": sizes(2),
        "allow_missing": COMPONENTS,
        "tokens": "ragged",
        "inner_backend": "eager",
    }
    fast = torch.compile(model, backend=fgtp_backend, options=options, **how)
    got = [fast(ids) for ids in given]
    assert fgtp_pass.applied_plan(fast) is not None
    return [relative_errors(one, other)[0] for one, other in zip(got, want, strict=True)]


@pytest.mark.parametrize("dynamic", [True, None])
@pytest.mark.parametrize("name", MODELS)
def test_ranks_of_which_one_has_one(ranks: Pools, name: str, dynamic: bool | None) -> None:
    calls = [[(2, 1), (2, 6)], [(1, 6), (2, 3)], [(3, 4), (1, 1)]]
    for errors in ranks(2).run(_as_unsharded, name, calls, dynamic=dynamic):
        assert max(errors) < 1e-5

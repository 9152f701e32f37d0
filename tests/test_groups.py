"""Component groups: consecutive ranks, several sizes, and data parallel x tensor parallel."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import zoo
from decoding import prompts, relative_errors, sizes
from ranks import Pool, Pools
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import fgtp_pass
from fgtp_pass import fgtp_backend
from fgtp_pass.weights.state import sharded_parameters


@torch.no_grad()
def _groups_of(config: dict[str, int]) -> dict[str, tuple[int, ...]]:
    model = zoo.build("llama")
    options = {"finegrained_tp_config": config, "inner_backend": "eager"}
    ids = prompts(dist.get_rank(), 2, 4, 160)
    want = model(input_ids=ids).logits
    fast = torch.compile(model, backend=fgtp_backend, options=options)
    assert relative_errors(fast(input_ids=ids).logits, want)[0] < 1e-5
    return {
        name: parameter._fgtp_record.group.ranks
        for name, parameter in sharded_parameters(model).items()
    }


def test_groups_are_consecutive_ranks_with_sizes_per_component(ranks: Pools) -> None:
    results = ranks(4).run(_groups_of, sizes(embedding=4, lmhead=2, oproj=2, mlp=4))
    for rank, groups in enumerate(results):
        pair = (0, 1) if rank < 2 else (2, 3)
        assert groups["model.embed_tokens.weight"] == (0, 1, 2, 3)
        assert groups["model.layers.0.mlp.up_proj.weight"] == (0, 1, 2, 3)
        assert groups["model.layers.1.self_attn.o_proj.weight"] == pair
        assert groups["lm_head.weight"] == pair


@torch.no_grad()
def _independent_groups() -> None:
    """Two groups of two need not be in step with each other, not even in their token counts."""
    model = zoo.build("llama")
    options = {"finegrained_tp_config": sizes(2), "inner_backend": "eager"}
    fast = torch.compile(model, backend=fgtp_backend, options=options)
    rank = dist.get_rank()
    first = prompts(rank, 2, 4, 160)
    wants = {n: model(input_ids=prompts(rank, 2, n, 160)).logits for n in (4, 5, 6, 7)}
    assert relative_errors(fast(input_ids=first).logits, wants[4])[0] < 1e-5
    for length in (5, 6) if rank < 2 else (7, 7, 7, 5):
        got = fast(input_ids=prompts(rank, 2, length, 160)).logits
        assert relative_errors(got, wants[length])[0] < 1e-5


def test_groups_do_not_wait_for_each_other(ranks: Pools) -> None:
    ranks(4).run(_independent_groups)


class MegatronBlock(nn.Module):
    """Attention and FFN cut by heads and by inner features, Megatron style, with all_reduce.

    Shoeybi et al., "Megatron-LM", 2019. The cut weights are this rank's; `group` is None for the
    whole model.
    """

    def __init__(self, whole: dict[str, torch.Tensor], rank: int, size: int, group: Any) -> None:
        super().__init__()
        self.group, self.heads, self.size = group, 4 // size, size

        def rows(name: str) -> nn.Parameter:
            return nn.Parameter(whole[name].chunk(size, 0)[rank].clone())

        def columns(name: str) -> nn.Parameter:
            return nn.Parameter(whole[name].chunk(size, 1)[rank].clone())

        self.q, self.k, self.v = rows("q"), rows("k"), rows("v")
        self.o, self.up, self.down = columns("o"), rows("up"), columns("down")

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        if self.group is None:
            return x
        return funcol.all_reduce(x, "sum", self.group)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        normed = nn.functional.layer_norm(x, x.shape[-1:])

        def split(weight: torch.Tensor) -> torch.Tensor:
            y = nn.functional.linear(normed, weight)
            return y.view(batch, length, self.heads, -1).transpose(1, 2)

        attended = nn.functional.scaled_dot_product_attention(
            split(self.q), split(self.k), split(self.v), is_causal=True
        )
        joined = attended.transpose(1, 2).reshape(batch, length, -1)
        x = x + self.sum(nn.functional.linear(joined, self.o))
        inner = nn.functional.gelu(
            nn.functional.linear(nn.functional.layer_norm(x, x.shape[-1:]), self.up)
        )
        return x + self.sum(nn.functional.linear(inner, self.down))


class MegatronModel(nn.Module):
    def __init__(self, seed: int, rank: int, size: int, group: Any) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

        self.table = nn.Parameter(random(96, 32))
        shapes = {"q": (32, 32), "k": (32, 32), "v": (32, 32), "o": (32, 32)}
        shapes |= {"up": (64, 32), "down": (32, 64)}
        self.blocks = nn.ModuleList(
            MegatronBlock({n: random(*s) for n, s in shapes.items()}, rank, size, group)
            for _ in range(2)
        )
        self.head = nn.Parameter(random(96, 32))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = nn.functional.embedding(ids, self.table)
        for block in self.blocks:
            x = block(x)
        return nn.functional.linear(x, self.head)


@torch.no_grad()
def _data_parallel_by_tensor_parallel(as_mesh: bool) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    tensor_parallel = mesh["tp"]
    whole = MegatronModel(seed=3, rank=0, size=1, group=None)
    model = MegatronModel(
        seed=3, rank=tensor_parallel.get_local_rank(), size=2, group=tensor_parallel.get_group()
    )
    data_parallel = mesh["dp"]
    fast = torch.compile(
        model,
        backend=fgtp_backend,
        options={
            "finegrained_tp_config": sizes(2),
            "inner_backend": "aot_eager",
            "process_group": data_parallel if as_mesh else data_parallel.get_group(),
        },
    )
    for length in (5, 6):  # static sizes, then dynamic ones
        ids = prompts(data_parallel.get_local_rank(), 2, length, 96)
        assert relative_errors(fast(ids), whole(ids))[0] < 1e-5
    plan = fgtp_pass.applied_plan(fast)
    assert plan is not None
    counts = {c: sum(s.component == c for s in plan.sites) for c in ("oproj", "mlp")}
    assert counts == {"oproj": 2, "mlp": 2}
    assert {s.component for s in plan.sites} == {"embedding", "lmhead", "oproj", "mlp"}
    for parameter in sharded_parameters(model).values():
        assert len(set(parameter._fgtp_record.group.ranks)) == 2
    fgtp_pass.unshard(fast)


@pytest.mark.parametrize("as_mesh", [True, False])
def test_composes_with_the_models_own_tensor_parallelism(ranks: Pools, as_mesh: bool) -> None:
    ranks(4).run(_data_parallel_by_tensor_parallel, as_mesh)


@torch.no_grad()
def _destroyed_and_made_again(folder: str) -> None:
    """A model on a group that is destroyed, then one on a new group of the same ranks."""

    def step(group: Any) -> None:
        model, ids = zoo.build("llama"), prompts(dist.get_rank(), 2, 4, 160)
        want = model(input_ids=ids).logits
        options = {
            "finegrained_tp_config": sizes(2),
            "inner_backend": "eager",
            "process_group": group,
        }
        fast = torch.compile(model, backend=fgtp_backend, options=options)
        assert relative_errors(fast(input_ids=ids).logits, want)[0] < 1e-5

    for _ in range(2):
        group = dist.new_group([0, 1])
        step(group)
        dist.destroy_process_group(group)
    step(None)
    rank = dist.get_rank()
    dist.barrier()
    dist.destroy_process_group()
    store = f"file://{folder}/again"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    step(None)


def test_groups_that_are_destroyed_and_made_again(tmp_path: Path) -> None:
    pool = Pool(2)
    try:
        pool.run(_destroyed_and_made_again, str(tmp_path))
    finally:
        pool.close()

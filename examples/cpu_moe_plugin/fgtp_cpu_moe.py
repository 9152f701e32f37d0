"""What vLLM's CPU build lacks for data-parallel MoE models. For demos and tests on CPUs only.

A vLLM plugin by itself: put its folder on PYTHONPATH. Without it stock vLLM cannot run such models
on CPUs either.
"""

from typing import Any

import torch
import torch.distributed as dist


def install() -> None:
    """vLLM calls it in every process, sometimes more than once."""
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    CpuCommunicator.all_gatherv = all_gatherv
    CpuCommunicator.reduce_scatterv = reduce_scatterv
    try:
        from vllm.v1.attention.backends.mla.cpu_mla import CPUMLABackend
    except ImportError:
        return
    CPUMLABackend.forward_includes_kv_cache_update = False  # padded tokens have no slot


def all_gatherv(
    self: Any, input_: Any, dim: int = 0, sizes: list[int] | None = None
) -> torch.Tensor | list[torch.Tensor]:
    if isinstance(input_, list):
        return [all_gatherv(self, one, dim, sizes) for one in input_]
    assert dim == 0
    counts = sizes or [input_.shape[0]] * self.world_size
    parts = [input_.new_empty(n, *input_.shape[1:]) for n in counts]
    rows = max(counts)
    padded = [input_.new_empty(rows, *input_.shape[1:]) for _ in counts]
    mine = input_.new_zeros(rows, *input_.shape[1:])
    mine[: input_.shape[0]] = input_
    dist.all_gather(padded, mine, group=self.device_group)
    for part, whole in zip(parts, padded, strict=True):
        part.copy_(whole[: part.shape[0]])
    return torch.cat(parts)


def reduce_scatterv(
    self: Any, input_: torch.Tensor, dim: int = -1, sizes: list[int] | None = None
) -> torch.Tensor:
    assert dim in (0, -input_.dim())
    total = input_.clone()
    dist.all_reduce(total, group=self.device_group)
    counts = sizes or [input_.shape[0] // self.world_size] * self.world_size
    return torch.split(total, counts)[self.rank_in_group].contiguous()

"""What vLLM's CPU build lacks for data-parallel MoE models. For demos and tests on CPUs only.

A vLLM plugin by itself: call `register`, and put this folder and that one on PYTHONPATH. Without it
stock vLLM cannot run such models on CPUs either.
"""

import functools
import inspect
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def register(folder: Path) -> None:
    """Make `folder` one in which vLLM finds this plugin like one that is installed."""
    info = folder / "vllm_cpu_moe-0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-cpu-moe\nVersion: 0\n")
    (info / "entry_points.txt").write_text(
        "[vllm.general_plugins]\nvllm_cpu_moe = vllm_cpu_moe:install\n"
    )


def install() -> None:
    """vLLM calls it in every process, sometimes more than once."""
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    if hasattr(CpuCommunicator, "all_gatherv") and CpuCommunicator.all_gatherv is all_gatherv:
        return
    CpuCommunicator.all_gatherv = all_gatherv
    CpuCommunicator.reduce_scatterv = reduce_scatterv
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    CPUUnquantizedExperts.apply = with_expert_map(CPUUnquantizedExperts.apply)
    try:
        from vllm.v1.attention.backends.mla.cpu_mla import CPUMLABackend
    except ImportError:
        return
    CPUMLABackend.forward_includes_kv_cache_update = False  # padded tokens have no slot


def with_expert_map(stock: Any) -> Any:
    """The experts of this rank only; vLLM's CPU kernel takes every expert's number for a local one.

    Without this it reads past its weights under expert parallelism.
    """
    signature = inspect.signature(stock)

    @functools.wraps(stock)
    def apply(*args: Any, **kwargs: Any) -> None:
        given = signature.bind(*args, **kwargs).arguments
        if given["expert_map"] is not None:
            ids, weights = given["topk_ids"], given["topk_weights"]
            local = given["expert_map"][ids.long()]
            given["topk_ids"] = local.clamp(min=0).to(ids.dtype)
            given["topk_weights"] = torch.where(local < 0, 0.0, weights).to(weights.dtype)
        stock(**given)

    return apply


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

"""What keeps the data-parallel ranks in step: every rank of a group runs every step, at one size.

Stock vLLM keeps MoE models in step, since their experts are shared, and makes the ranks of a dense
model independent engines. A dense model whose layers are shared is in the same place as a MoE
model, so its configuration says so.
"""

import dataclasses
import functools
from typing import Any

import torch
from vllm.config import ModelConfig
from vllm.v1.worker import dp_utils
from vllm.v1.worker.gpu import dp_utils as v2_dp_utils

from fgtp_pass.vllm.settings import read_options
from fgtp_pass.vllm.work import STEP


class InStepModelConfig(ModelConfig):  # type: ignore[misc]
    """The configuration of a dense model whose ranks run in step, as those of MoE models do.

    A class, since the engine process unpickles it before it loads plugins.
    """

    @property
    def is_moe(self) -> bool:
        return True


def create_model_config(stock: Any, self: Any) -> ModelConfig:
    """What `EngineArgs.create_model_config` does, in step if the pass is asked for."""
    config: ModelConfig = stock(self)
    if read_options(self.compilation_config, self.additional_config) is None or config.is_moe:
        return config
    config.__class__ = InStepModelConfig
    return config


def join_host_messages() -> None:
    """Let both model runners pad all data-parallel ranks to one token count in every step, and
    carry our `Work` in the message by which they agree.

    Stock vLLM pads where CUDA graphs or micro-batches need it; component groups always do.
    Idempotent; called in worker processes of engines that use the pass.
    """
    if isinstance(dp_utils.dist, _Carrying):
        return
    dp_utils.dist = _Carrying(dp_utils.dist)
    if hasattr(v2_dp_utils, "dist"):
        v2_dp_utils.dist = _Carrying(v2_dp_utils.dist)
    else:  # since 0.33 through the group
        stock_group = v2_dp_utils.get_dp_group
        v2_dp_utils.get_dp_group = lambda: _CarryingGroup(stock_group())
    dp_utils._post_process_dp_padding = _around(dp_utils._post_process_dp_padding, _pad_v1)
    v2_dp_utils.sync_cudagraph_and_dp_padding = _around(
        v2_dp_utils.sync_cudagraph_and_dp_padding, _pad_v2
    )


class _Carrying:
    """Stands for torch.distributed in the modules in which runners agree."""

    def __init__(self, stock: Any):
        self._stock = stock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stock, name)

    def all_reduce(self, message: torch.Tensor, group: Any) -> None:
        rank = self._stock.get_rank(group)
        STEP.exchange(message, rank, lambda both: self._stock.all_reduce(both, group=group))


class _CarryingGroup:
    """Stands for the data-parallel group there."""

    def __init__(self, stock: Any):
        self._stock = stock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stock, name)

    def cpu_all_reduce_(self, message: torch.Tensor) -> torch.Tensor:
        STEP.exchange(message, self._stock.rank_in_group, self._stock.cpu_all_reduce_)
        return message


def _around(stock: Any, function: Any) -> Any:
    return functools.update_wrapper(functools.partial(function, stock), stock)


def _pad_v1(stock: Any, tensor: torch.Tensor, should_dp_pad: bool) -> torch.Tensor:
    """[4, data-parallel size] of what the ranks said -> the token count of each, all the same."""
    padded: torch.Tensor = stock(tensor, True)
    return padded


def _pad_v2(stock: Any, *args: Any, **kwargs: Any) -> Any:
    """The V2 runner's step without CUDA graphs is not padded by stock vLLM. Padded, an idle rank's
    dummy request is as long as the others' batch, so requests are of one length no more.
    """
    batch, sync = stock(*args, **kwargs)
    if sync is None or not sync.eager:
        return batch, sync
    largest = int(sync.num_tokens_across_dp.max())
    everywhere = torch.full_like(sync.num_tokens_across_dp, largest)
    return (
        dataclasses.replace(batch, num_tokens=largest),
        dataclasses.replace(sync, num_tokens_across_dp=everywhere, uniform_token_count=None),
    )

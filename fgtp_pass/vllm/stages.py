"""Pipeline stages: each has some of the layers, and shares them among its own data-parallel ranks.

Every stage plans the whole model, so that none misses a component that others have, and takes its
own layers from the plan: they have the same names there as in the whole model.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar
from unittest import mock

from torch import nn
from vllm.distributed import parallel_state
from vllm.distributed.parallel_state import get_pp_group

from fgtp_pass.plan.plan import Plan

LAYERS_BY_STAGE = "VLLM_PP_LAYER_PARTITION"  # vLLM's variable: how many layers each stage has

_Role = TypeVar("_Role")


class _OneStage:
    """Stands for the group of stages while the whole model is planned."""

    world_size = 1
    rank_in_group = 0
    is_first_rank = True
    is_last_rank = True


@contextmanager
def in_one_stage() -> Iterator[None]:
    """Models that are built within have all layers."""
    with mock.patch.object(parallel_state, "_PP", _OneStage()), mock.patch.dict(os.environ):
        os.environ.pop(LAYERS_BY_STAGE, None)
        yield


def has_one_stage() -> bool:
    return bool(get_pp_group().world_size == 1)


def is_first_stage() -> bool:
    """Whether this is the stage that embeds."""
    return bool(get_pp_group().is_first_rank)


def plan_of_stage(plan: Plan, part: nn.Module) -> Plan:
    """What of a whole model's plan is of this stage, of which `part` is the model.

    A tied table is on the first and on the last one, once to embed and once for logits.
    """
    pp = get_pp_group()
    names = {name for name, _ in part.named_parameters(remove_duplicate=False)}
    runs = {"embedding": pp.is_first_rank, "lmhead": pp.is_last_rank}
    sites = tuple(
        site
        for site in plan.sites
        if runs.get(site.component, True) and all(weight.fqn in names for weight in site.weights)
    )
    left = tuple(left for left in plan.left_alone if left.fqn in names)
    return plan.model_copy(update={"sites": sites, "left_alone": left})


def roles_of_stage(
    roles: Mapping[int, _Role],
    whole: nn.Module,
    built: Sequence[nn.Module],
    part: nn.Module,
    built_of_part: Sequence[nn.Module],
) -> dict[int, _Role]:
    """Those of this stage's layers, by their numbers there.

    built, built_of_part: the layers of the whole model, and of its part, by number.
    """
    of_layer = {id(built[number]): role for number, role in roles.items()}
    by_name = {
        name: of_layer[id(layer)]
        for name, layer in whole.named_modules(remove_duplicate=False)
        if id(layer) in of_layer
    }
    numbers = {id(layer): number for number, layer in enumerate(built_of_part)}
    return {
        numbers[id(layer)]: by_name[name]
        for name, layer in part.named_modules(remove_duplicate=False)
        if id(layer) in numbers and name in by_name
    }

"""From the names of a checkpoint to those of a model, or an error that names the nearest."""

import difflib
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from fgtp_pass.checkpoint import hugging_face
from fgtp_pass.checkpoint.files import Checkpoint
from fgtp_pass.errors import CheckpointError

log = logging.getLogger("fgtp_pass")

_SHOWN = 5  # names in an error
_CASTABLE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Found:
    """The lazy tensor of a weight, and others that have to be equal: it is tied in the model."""

    tensor: torch.Tensor
    twins: tuple[torch.Tensor, ...] = ()


def tensor_names(model: nn.Module) -> dict[torch.Tensor, list[str]]:
    """The parameters and persistent buffers of a model with their names; a tied one has several."""
    names: dict[torch.Tensor, list[str]] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if isinstance(value, torch.Tensor):
            names.setdefault(value, []).append(name)
    return names


def match_names(model: nn.Module, checkpoint: Checkpoint) -> dict[torch.Tensor, Found]:
    """What the checkpoint has for each parameter and persistent buffer.

    A buffer may be missing, since most are computed. Raises CheckpointError for a parameter that is
    missing, and for another shape or kind of dtype.
    """
    stored = dict(checkpoint.tensors)
    if hugging_face.is_pretrained_model(model) and not checkpoint.in_parts:
        stored = hugging_face.to_model(model, stored)
    if checkpoint.index is not None:
        for name, saved in checkpoint.index.tensors.items():
            stored |= dict.fromkeys(saved.tied, stored[name])
    found: dict[torch.Tensor, Found] = {}
    missing: list[str] = []
    unused = dict(stored)
    for value, names in tensor_names(model).items():
        tensors = list(dict.fromkeys(unused.pop(name) for name in names if name in unused))
        for tensor in tensors:
            check_like(names[0], tensor, value)
        if tensors:
            found[value] = Found(tensors[0], tuple(tensors[1:]))
        elif isinstance(value, nn.Parameter):
            missing.append(names[0])
    if hugging_face.is_pretrained_model(model):
        unused = {n: t for n, t in unused.items() if not hugging_face.is_ignored(model, n)}
    if missing:
        raise CheckpointError(_missing(checkpoint, missing, unused))
    if unused:
        log.warning(
            "%s: the model has no place for %d of the checkpoint's tensors: %s",
            checkpoint.path, len(unused), _some(unused),
        )  # fmt: skip
    return found


def check_like(name: str, given: torch.Tensor, value: torch.Tensor) -> None:
    """Raise CheckpointError unless `given` can be the data of `value`, if need be cast."""
    if given.shape != value.shape:
        raise CheckpointError(
            f"{name} has shape {list(value.shape)} in the model, and was given as "
            f"{list(given.shape)}. They are of different models or configurations."
        )
    same_kind = given.dtype in _CASTABLE and value.dtype in _CASTABLE
    if given.dtype != value.dtype and not same_kind:
        raise CheckpointError(
            f"{name} is {value.dtype} in the model, and was given as {given.dtype}, which would "
            "lose its meaning in a cast. Quantised checkpoints have to be dequantised first."
        )


def _missing(checkpoint: Checkpoint, missing: list[str], unused: Mapping[str, object]) -> str:
    nearest = []
    for name in missing[:_SHOWN]:
        near = difflib.get_close_matches(name, list(unused), n=1, cutoff=0.4)
        nearest.append(f"{name} (nearest unused: {near[0]})" if near else name)
    more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
    return (
        f"{checkpoint.path} has no tensor for {len(missing)} of the model's weights: "
        f"{', '.join(nearest)}{more}. Tensors that no weight has taken: {_some(unused)}."
    )


def _some(names: Collection[str]) -> str:
    shown = sorted(names)[:_SHOWN]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (", ".join(shown) or "none") + more

"""Models without memory: built on the meta device, and then given unread parameters."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn

from fgtp_pass.checkpoint import hugging_face
from fgtp_pass.errors import CheckpointError


@contextmanager
def init_empty_weights() -> Iterator[None]:
    """Build models whose parameters take no memory: they go to the meta device as they are made.

    Buffers are real, so what a constructor computes (rotary tables, masks) is computed. Models of
    transformers can as well be built under `torch.device("meta")`.
    """
    register = nn.Module.register_parameter

    def register_on_meta(self: nn.Module, name: str, param: Any) -> None:
        if isinstance(param, nn.Parameter) and param.device.type != "meta":
            kept = param.__dict__
            param = type(param)(param.data.to("meta"), requires_grad=param.requires_grad)
            param.__dict__.update(kept)
        register(self, name, param)

    with mock.patch.object(nn.Module, "register_parameter", register_on_meta):
        yield


def fill_buffers(
    model: nn.Module, known: Mapping[torch.Tensor, torch.Tensor], device: torch.device
) -> None:
    """Put the buffers on the device: from `known`, as they are, or computed by the model's code.

    Raises CheckpointError for one that is on the meta device and that nothing computes.
    """
    new = dict(known)
    empty: dict[torch.Tensor, str] = {}
    for name, buffer in model.named_buffers():
        if buffer in new:
            continue
        if buffer.device.type == "meta":
            new[buffer] = torch.empty_like(buffer, device=device)
            empty[new[buffer]] = name
        else:
            new[buffer] = buffer.to(device)
    for module in model.modules():
        module._buffers.update({n: new[b] for n, b in module._buffers.items() if b is not None})
    if not empty:
        return
    untouched = {buffer: buffer._version for buffer in empty}
    if hugging_face.is_pretrained_model(model):
        owners = [m for m in model.modules() if any(b in empty for b in m.buffers(recurse=False))]
        hugging_face.compute_buffers(model, owners)
    left = [empty[buffer] for buffer, version in untouched.items() if buffer._version == version]
    if left:
        raise CheckpointError(
            f"{', '.join(left)}: buffers on the meta device that the checkpoint has not, and that "
            "the model's own code does not compute. Build the model in fgtp_pass."
            "init_empty_weights(), which leaves buffers real."
        )


def drop_parameters(model: nn.Module) -> None:
    """Leave a model without weights: its parameters are on the meta device."""
    dropped: dict[torch.Tensor, nn.Parameter] = {
        p: nn.Parameter(
            torch.empty_strided(p.shape, p.stride(), dtype=p.dtype, device="meta"),
            requires_grad=p.requires_grad,
        )
        for p in model.parameters()
        if not p.is_meta
    }
    replace_parameters(model, dropped)


def replace_parameters(model: nn.Module, new: Mapping[torch.Tensor, nn.Parameter]) -> None:
    """Put other parameters into the place of those there; tied ones stay tied."""
    for module in model.modules():
        there = {n: new[p] for n, p in module._parameters.items() if p is not None and p in new}
        module._parameters.update(there)

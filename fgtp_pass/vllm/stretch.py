"""An FFN without a graph: up hands its cut features to down, as the rewritten graph does.

Own -ag-> All x W[out/k] -> Cut x W[in/k] -> Sum -rs-> Own, where model code runs between the two
matmuls. That code works per feature, which the plan has found; that it takes whatever number of
features it is given is tried on the meta device, since some has the full width written into it.
"""

from collections.abc import Iterable
from typing import Any
from unittest import mock

import torch
from torch import nn

from fgtp_pass.collectives import functional
from fgtp_pass.collectives.groups import ComponentGroup
from fgtp_pass.errors import FgtpError, first_line

_ROWS = 3


class Stretch:
    """One FFN of this rank while a step runs it.

    ups: how many projections read its input, one after the other.
    """

    def __init__(self, ups: int):
        self._ups = ups
        self._input: torch.Tensor | None = None
        self._everyone: torch.Tensor | None = None
        self._left = 0

    def gather(self, run: Any, group: ComponentGroup, x: torch.Tensor) -> torch.Tensor:
        """[rows, in] -> [k*rows, in], once for all of the ups."""
        if self._input is not x or self._everyone is None:
            self._everyone = functional.all_gather(run, group, x)
            self._input, self._left = x, self._ups
        everyone = self._everyone
        self._left -= 1
        if not self._left:
            self._input = self._everyone = None
        return everyone


def check_arrived(x: torch.Tensor, features: int, name: str, component: str) -> None:
    """Raise FgtpError unless the features that reach down are those of its shard."""
    if x.dim() != 2 or x.shape[1] != features:
        raise FgtpError(
            f"{name} got an input of shape {tuple(x.shape)} in the place of [tokens, {features}]: "
            "the code before it does not work on cut features. Please report this model, and leave "
            f"{component} out of finegrained_tp_config."
        )


def why_not_cut(model: nn.Module, ups: Iterable[str], down: str, size: int) -> str:
    """Why the module around an FFN of a model on the meta device does not work at 1/size of its
    width; an empty string if it does.

    ups, down: names of its projections.
    """
    projections: dict[str, Any] = {name: model.get_submodule(name) for name in (*ups, down)}
    *most, last = projections.values()
    outer = model.get_submodule(_common([*projections]))
    arrived: list[torch.Size] = []

    def at_up(layer: Any) -> Any:
        def forward(x: torch.Tensor) -> Any:
            out = torch.empty(size * x.shape[0], layer.output_size // size, device="meta")
            return (out, None) if layer.return_bias else out

        return forward

    def at_down(x: torch.Tensor) -> Any:
        arrived.append(x.shape)
        out = torch.empty(_ROWS, last.output_size, device="meta")
        return (out, None) if last.return_bias else out

    x = torch.empty(_ROWS, most[0].input_size, device="meta")
    with torch.no_grad(), mock.patch.object(last, "forward", at_down):
        patches = [mock.patch.object(up, "forward", at_up(up)) for up in most]
        try:
            for patch in patches:
                patch.start()
            outer(x)
        except Exception as error:  # it takes more than its input, or fixes widths
            name = type(outer).__name__
            return f"{name} cannot be run on cut features alone ({first_line(error)})"
        finally:
            for patch in patches:
                patch.stop()
    if arrived != [torch.Size((size * _ROWS, last.input_size // size))]:
        return f"{type(outer).__name__} makes features of another width of cut ones"
    return ""


def _common(names: list[str]) -> str:
    """The name of the innermost module that holds all of these."""
    parts = [name.split(".") for name in names]
    shared = 0
    while len({tuple(p[: shared + 1]) for p in parts}) == 1:
        shared += 1
    return ".".join(parts[0][:shared])

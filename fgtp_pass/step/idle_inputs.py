"""What a rank without tokens runs in a step."""

import contextlib
import functools
import weakref
from collections.abc import Callable, Container, Sequence
from typing import Any

import torch
from torch import fx, nn


class IdleInputs:
    """Runs a graph's sites alone, on rows of zeros, for a rank that has nothing to do.

    The rank still multiplies its shards with the others' tokens. What runs takes those inputs of
    the step's graph that the sites need (shards, biases, scalars), at `positions`, and then one row
    count per site. It runs under the autocast that this was made under, as the step does. It does
    not keep the model alive: what belongs to that is held weakly.
    """

    def __init__(self, positions: Sequence[int]):
        self._positions = positions
        self._autocast = {
            device: torch.get_autocast_dtype(device)
            for device in ("cpu", "cuda")
            if torch.is_autocast_enabled(device)
        }
        self._held: list[Callable[[], Any]] = []

    def remember(self, inputs: Sequence[Any], owned: Container[int]) -> None:
        """Take the inputs of a run; those at `owned` belong to parameters."""
        if not self._held:
            self._held = [_nothing] * len(self._positions)
        for i, position in enumerate(self._positions):
            value = inputs[position]
            if self._held[i]() is not value:
                weakly = position in owned or isinstance(value, nn.Parameter)
                self._held[i] = weakref.ref(value) if weakly else functools.partial(_same, value)

    @property
    def ready(self) -> bool:
        """Whether it has run, and what it ran with is still there."""
        held = len(self._held) == len(self._positions)
        return held and all(held() is not None for held in self._held)

    def run(self, idle: fx.GraphModule, counts: Sequence[int]) -> None:
        """counts: rows by site."""
        with torch.no_grad(), contextlib.ExitStack() as stack:
            for device in ("cpu", "cuda"):
                dtype = self._autocast.get(device)
                stack.enter_context(torch.autocast(device, dtype=dtype, enabled=dtype is not None))
            idle(*(held() for held in self._held), *counts)


def _nothing() -> None:
    return None


def _same(value: Any) -> Any:
    return value

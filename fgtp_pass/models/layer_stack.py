"""A model's decoder layers: which are alike, and how a plan of one stands for all of its kind."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

from torch import nn

from fgtp_pass.plan.plan import LeftAlone, Plan, Site

_Named = TypeVar("_Named", Site, LeftAlone)


@dataclass(frozen=True)
class LayerStack:
    """The longest ModuleList of a model: `owner.attribute`, whose parameters start with `prefix`.

    kinds: of each layer, equal for layers that compute the same function of their parameters.
    """

    owner: nn.Module
    attribute: str
    prefix: str
    layers: nn.ModuleList
    kinds: tuple[Any, ...]

    @cached_property
    def stand_ins(self) -> tuple[int, ...]:
        """For each layer, the one that is traced for it: alike, and between alike neighbours.

        Sites of neighbouring layers may touch, so a layer's plan depends on these too. Of layers
        that come in a repeated block (behind some that do not) two blocks and the end are traced.
        """
        count = len(self.kinds)
        before, block = _repetition(self.kinds)
        second, end = before + block, count - block - (count - before) % block
        return tuple(
            i if i < second or i >= end else second + (i - second) % block for i in range(count)
        )

    @property
    def firsts(self) -> list[int]:
        """The first layer of each kind."""
        return [self.kinds.index(kind) for kind in dict.fromkeys(self.kinds)]

    @property
    def traced(self) -> list[int]:
        """The layers that stand for all."""
        return sorted(set(self.stand_ins))

    @contextmanager
    def only(self, positions: Sequence[int]) -> Iterator[None]:
        """The model with these layers alone, numbered anew."""
        setattr(self.owner, self.attribute, nn.ModuleList(self.layers[i] for i in positions))
        try:
            yield
        finally:
            setattr(self.owner, self.attribute, self.layers)

    def number(self, fqn: str) -> int | None:
        """The layer of a parameter, None for one that is in none."""
        found = re.match(re.escape(self.prefix) + r"(\d+)\.", fqn)
        return int(found[1]) if found else None

    def renumbered(self, fqn: str, number: int) -> str:
        return re.sub(re.escape(self.prefix) + r"\d+\.", f"{self.prefix}{number}.", fqn, count=1)


def find_layers(model: nn.Module) -> LayerStack | None:
    """The stack of decoder layers; None for a model without a ModuleList."""
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        return None
    name, layers = max(lists, key=lambda item: len(item[1]))
    parent, _, attribute = name.rpartition(".")
    kinds = tuple(_kind(layer) for layer in layers)
    return LayerStack(model.get_submodule(parent), attribute, f"{name}.", layers, kinds)


def _repetition(kinds: Sequence[Any]) -> tuple[int, int]:
    """How many layers come before a repeated block, and how long that is: the shortest pair."""
    count = len(kinds)
    pairs = sorted(((s, p) for s in range(count) for p in range(1, count - s + 1)), key=sum)
    return next(
        (s, p) for s, p in pairs if all(kinds[i] == kinds[i + p] for i in range(s, count - p))
    )


def _kind(layer: nn.Module) -> tuple[Any, ...]:
    """Its modules with their plain settings (window, rotation ...), and its parameters."""
    modules = tuple(
        (name, type(module).__qualname__, *_settings(module))
        for name, module in layer.named_modules()
    )
    return modules, tuple((name, p.shape, p.dtype) for name, p in layer.named_parameters())


def _settings(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for key, value in vars(module).items():
        if not key.startswith("_") and key != "layer_idx" and isinstance(value, (str, int, float)):
            yield key, value


def expand(traced: Plan, stack: LayerStack) -> Plan:
    """The plan of all layers, from that of the model with `stack.traced` only."""
    stands_in = [stack.traced.index(layer) for layer in stack.stand_ins]
    numbers = [stack.number(site.weights[0].fqn) for site in traced.sites]
    inner = [i for i, number in enumerate(numbers) if number is not None]
    start, end = (inner[0], inner[-1] + 1) if inner else (0, 0)
    layered = [
        _moved(site, stack, to)
        for to, source in enumerate(stands_in)
        for site, number in zip(traced.sites, numbers, strict=True)
        if number == source
    ]
    left = [alone for alone in traced.left_alone if stack.number(alone.fqn) is None] + [
        _moved(alone, stack, to)
        for to, source in enumerate(stands_in)
        for alone in traced.left_alone
        if stack.number(alone.fqn) == source
    ]
    return traced.model_copy(
        update={
            "sites": (*traced.sites[:start], *layered, *traced.sites[end:]),
            "left_alone": tuple(sorted(left, key=lambda alone: alone.fqn)),
        }
    )


def only_layer(traced: Plan, stack: LayerStack, layer: int) -> Plan:
    """What a plan of the model with this layer only says of that layer."""
    return traced.model_copy(
        update={
            "sites": tuple(
                _moved(site, stack, layer)
                for site in traced.sites
                if stack.number(site.weights[0].fqn) is not None
            ),
            "left_alone": tuple(
                _moved(alone, stack, layer)
                for alone in traced.left_alone
                if stack.number(alone.fqn) is not None
            ),
        }
    )


def _moved(record: _Named, stack: LayerStack, to: int) -> _Named:
    """The same site, or reason, in layer number `to`."""
    if isinstance(record, LeftAlone):
        return record.model_copy(update={"fqn": stack.renumbered(record.fqn, to)})
    weights = (
        weight.model_copy(update={"fqn": stack.renumbered(weight.fqn, to)})
        for weight in record.weights
    )
    return record.model_copy(update={"weights": tuple(weights)})

"""What the formulas need to know of a model: the sums over each component's sites, and bytes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sympy import Symbol

from fgtp_pass.algebra import Collective, Cut
from fgtp_pass.cost import formulas
from fgtp_pass.plan import Plan, Site, WeightCut, itemsize
from fgtp_pass.sizes import config_error, unknown

# bytes per element of linear weights, and the dtype that they are multiplied in (None: the model's)
QUANTIZATIONS: Mapping[str, tuple[float, str | None]] = {
    "w8a8": (1.0, "int8"),
    "fp8": (1.0, "float8"),
    "w8a16": (1.0, None),
    "w4a16": (0.5, None),
}
# left in the model's dtype by every one of them
_NOT_QUANTIZED = ("embedding", "lmhead")


@dataclass(frozen=True)
class Precision:
    """Bytes of one element of a weight matrix, and the dtype that it is multiplied in."""

    element_bytes: float
    matmul_dtype: str


def precision(dtype: str, quantization: str | None, component: str = "") -> Precision:
    """How a component's weights are kept and multiplied. Raises ConfigError for unknown schemes.

    dtype: the model's, by torch's name. Scales and zero points are not counted.
    """
    if quantization is not None and quantization not in QUANTIZATIONS:
        known = [*QUANTIZATIONS, "none"]
        raise config_error(unknown("scheme", quantization, known, "quantization"))
    if quantization is None or component in _NOT_QUANTIZED:
        return Precision(itemsize(dtype), dtype)
    element_bytes, matmul_dtype = QUANTIZATIONS[quantization]
    return Precision(element_bytes, matmul_dtype or dtype)


@dataclass(frozen=True)
class ComponentShape:
    """One component of a plan: all that the formulas need of it are sums over its sites.

    weights: its cut weights, without those that a component before it ties and counts.
    """

    component: str
    sites: tuple[Site, ...]
    weights: tuple[WeightCut, ...]
    precision: Precision

    def values(self) -> dict[Symbol, Any]:
        """The numbers for the component's symbols in the formulas."""
        lookups = [site for site in self.sites if Cut.ROWS.value in site.cuts]
        moved = [m for s in self.sites for m in zip(s.collectives, s.widths, strict=True)]
        found: dict[Symbol, Any] = {
            formulas.ELEMENTS: sum(
                math.prod(weight.shape)
                for site in self.sites
                if site not in lookups
                for weight in site.weights
                if len(weight.shape) == 2
            ),
            formulas.ELEMENT_BYTES: self.precision.element_bytes,
            formulas.ROW_BYTES: sum(site.widths[-1] for site in lookups),
        }
        for kind in Collective:
            widths = [width for name, width in moved if name == kind.value]
            found[formulas.COUNT[kind]] = len(widths)
            found[formulas.WIDTH[kind]] = sum(widths)
        return found

    @property
    def weight_bytes(self) -> float:
        """Bytes of all its weights on a rank that holds them whole."""
        return sum(math.prod(w.shape) * self._element_bytes(w) for w in self.weights)

    def bytes_saved(self, group_size: int) -> float:
        """Bytes that each rank frees. The last shard is padded to the others' size."""
        return sum(
            (math.prod(w.shape) - math.prod(w.shard_shape(group_size))) * self._element_bytes(w)
            for w in self.weights
        )

    def _element_bytes(self, weight: WeightCut) -> float:
        quantized = len(weight.shape) == 2
        return self.precision.element_bytes if quantized else itemsize(weight.dtype)


def component_shapes(
    plan: Plan, dtype: str, quantization: str | None = None
) -> dict[str, ComponentShape]:
    """The components of a plan by name. The group size of its sites does not matter."""
    shapes: dict[str, ComponentShape] = {}
    counted: set[str] = set()
    for component in dict.fromkeys(site.component for site in plan.sites):
        sites = tuple(site for site in plan.sites if site.component == component)
        cut = {w.fqn: w for s in sites for w in s.weights if w.cut_dim is not None}
        weights = tuple(weight for fqn, weight in cut.items() if fqn not in counted)
        counted |= cut.keys()
        shapes[component] = ComponentShape(
            component, sites, weights, precision(dtype, quantization, component)
        )
    return shapes

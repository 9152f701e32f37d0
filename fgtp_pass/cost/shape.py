"""What the formulas need to know of a component: the sums over its sites, and bytes."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from sympy import Symbol

from fgtp_pass.algebra.placement import Collective, Cut
from fgtp_pass.cost import formulas
from fgtp_pass.cost.quantization import Precision, Scheme, precision, scheme_of
from fgtp_pass.plan.plan import Plan, Site, WeightCut, itemsize

# left in the model's dtype by every scheme
_NOT_QUANTIZED = ("embedding", "lmhead")
# in vLLM computed by an op of its own, which takes shards
_NOT_GATHERED = ("sharedexpert",)


@dataclass(frozen=True)
class ComponentShape:
    """One component of a plan: all that the formulas need of it are sums over its sites.

    weights: its cut weights, without those that a component before it ties and counts. dtype: the
    model's. scheme: of its matmul weights, None for the model's dtype.
    """

    component: str
    sites: tuple[Site, ...]
    weights: tuple[WeightCut, ...]
    dtype: str
    scheme: Scheme | None = None

    @cached_property
    def precision(self) -> Precision:
        """Bytes of an element of its matmul weights on average, and the dtype of most."""
        if not self._matrices:
            return precision(self.dtype, None, "")
        kept = [(math.prod(w.shape), self._precision(w)) for w in self._matrices]
        total = sum(count for count, _ in kept)
        by_dtype: dict[str, int] = {}
        for count, one in kept:
            by_dtype[one.matmul_dtype] = by_dtype.get(one.matmul_dtype, 0) + count
        return Precision(
            element_bytes=sum(count * one.element_bytes for count, one in kept) / total,
            matmul_dtype=max(by_dtype, key=lambda name: by_dtype[name]),
        )

    def values(self, tensor_parallel_size: int = 1) -> dict[Symbol, Any]:
        """The numbers for the component's symbols in the formulas.

        Tensor parallelism has cut its weights before, and with them the features that its
        all_to_alls move.
        """
        found = dict(self._values)
        found[formulas.ELEMENTS] /= tensor_parallel_size
        found[formulas.WIDTH[Collective.ALL_TO_ALL]] /= tensor_parallel_size
        return found

    @cached_property
    def _values(self) -> dict[Symbol, Any]:
        lookups = [site for site in self.sites if site not in self._matmul_sites]
        moved = [m for s in self.sites for m in zip(s.collectives, s.widths, strict=True)]
        found: dict[Symbol, Any] = {
            formulas.MATMULS: sum(len(site.cuts) for site in self._matmul_sites),
            formulas.MATRICES: len(self._matrices),
            formulas.ELEMENTS: sum(math.prod(w.shape) for w in self._matrices),
            formulas.ELEMENT_BYTES: self.precision.element_bytes,
            formulas.ROW_BYTES: sum(site.widths[-1] for site in lookups),
        }
        for kind in Collective:
            widths = [width for name, width in moved if name == kind.value]
            found[formulas.COUNT[kind]] = len(widths)
            found[formulas.WIDTH[kind]] = sum(widths)
        return found

    @cached_property
    def _matmul_sites(self) -> tuple[Site, ...]:
        return tuple(site for site in self.sites if Cut.ROWS.value not in site.cuts)

    @cached_property
    def _matrices(self) -> tuple[WeightCut, ...]:
        return tuple(w for site in self._matmul_sites for w in site.weights if len(w.shape) == 2)

    @cached_property
    def may_gather(self) -> bool:
        """Whether a step may move its weights in place of tokens: matmuls, not quantised."""
        plain = self.precision.element_bytes == itemsize(self.dtype)
        return (
            plain and self.component not in _NOT_GATHERED and not self._values[formulas.ROW_BYTES]
        )

    def outputs(self, width: int) -> bool:
        """Whether it is a matmul with this many outputs: a head, which sees last tokens only."""
        return any(weight.shape[0] == width for weight in self._matrices)

    @cached_property
    def weight_bytes(self) -> float:
        """Bytes of all its weights on a rank that holds them whole."""
        return sum(math.prod(w.shape) * self.element_bytes(w) for w in self.weights)

    def bytes_saved(self, group_size: int) -> float:
        """Bytes that each rank frees. The last shard is padded to the others' size."""
        if group_size not in self._saved:
            self._saved[group_size] = sum(
                (math.prod(w.shape) - math.prod(w.shard_shape(group_size))) * self.element_bytes(w)
                for w in self.weights
            )
        return self._saved[group_size]

    @cached_property
    def _saved(self) -> dict[int, float]:
        return {}

    def _precision(self, weight: WeightCut) -> Precision:
        kept_whole = self.component in _NOT_QUANTIZED
        module = weight.fqn.rpartition(".")[0]
        return precision(self.dtype, None if kept_whole else self.scheme, module)

    def element_bytes(self, weight: WeightCut) -> float:
        """Bytes of one element of a weight."""
        quantized = len(weight.shape) == 2
        return self._precision(weight).element_bytes if quantized else itemsize(weight.dtype)


def component_shapes(
    plan: Plan, dtype: str, quantization: str | Scheme | None = None
) -> dict[str, ComponentShape]:
    """The components of a plan by name. The group size of its sites does not matter.

    quantization: the name of a scheme, or one. Raises ConfigError for a name that is none.
    """
    scheme = scheme_of(quantization) if isinstance(quantization, str) else quantization
    shapes: dict[str, ComponentShape] = {}
    counted: set[str] = set()
    for component in dict.fromkeys(site.component for site in plan.sites):
        sites = tuple(site for site in plan.sites if site.component == component)
        cut = {w.fqn: w for s in sites for w in s.weights if w.cut_dim is not None}
        weights = tuple(weight for fqn, weight in cut.items() if fqn not in counted)
        counted |= cut.keys()
        shapes[component] = ComponentShape(component, sites, weights, dtype, scheme)
    return shapes

"""What a plan saves and costs on given hardware: the formulas, evaluated."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from sympy import Expr, Symbol

from fgtp_pass.cost import formulas
from fgtp_pass.cost.hardware import Hardware
from fgtp_pass.cost.shape import ComponentShape
from fgtp_pass.cost.uncertainty import Predicted, Scale, predict

Range = tuple[int, int | None]


@dataclass(frozen=True)
class Cluster:
    """Where a plan runs: data-parallel ranks in nodes of equal devices.

    ranks_per_node: data-parallel ranks of one node. tensor_parallel_size: devices of one rank.
    """

    hardware: Hardware
    data_parallel_size: int
    ranks_per_node: int
    tensor_parallel_size: int = 1
    _constants: dict[str, dict[Symbol, float]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def constants(self, dtype: str) -> Mapping[Symbol, float]:
        """The numbers of the hardware's symbols, and of RANKS_PER_NODE."""
        if dtype not in self._constants:
            nodes = {formulas.RANKS_PER_NODE: min(self.ranks_per_node, self.data_parallel_size)}
            self._constants[dtype] = {**self.hardware.values(dtype), **nodes}
        return self._constants[dtype]

    def values(self, shape: ComponentShape, scale: Scale | None = None) -> dict[Symbol, float]:
        """The numbers of all symbols for a component here, but for TOKENS and GROUP.

        scale: factors for some of them.
        """
        values = {
            **shape.values(self.tensor_parallel_size),
            **self.constants(shape.precision.matmul_dtype),
        }
        for symbol, factor in (scale or {}).items():
            values[symbol] *= factor
        return values

    def seconds(
        self,
        expression: Expr,
        shape: ComponentShape,
        group_size: int,
        tokens: float,
        scale: Scale | None = None,
    ) -> float:
        """What one of the formulas of a component gives."""
        values = self.values(shape, scale)
        return formulas.evaluate(
            expression, {**values, formulas.GROUP: group_size, formulas.TOKENS: tokens}
        )

    def change_seconds(
        self, shape: ComponentShape, group_size: int, tokens: float, scale: Scale | None = None
    ) -> float:
        """Predicted change of a step's seconds; below 0 is a gain. 0 for a group of one."""
        return self.seconds(formulas.CHANGE_SECONDS, shape, group_size, tokens, scale)

    def change_range(self, shape: ComponentShape, group_size: int, tokens: float) -> Predicted:
        """The same with its range under the spreads of the hardware's constants."""
        return predict(
            lambda scale: self.change_seconds(shape, group_size, tokens, scale),
            self.hardware.spreads,
        )

    def pays_at(self, shape: ComponentShape, group_size: int) -> Range | None:
        """The first and last tokens per rank at which cutting gains time; None if it never does.

        The last is None where there is no end to it.
        """
        if group_size == 1:
            return None
        last = formulas.last_paying(lambda tokens: self.change_seconds(shape, group_size, tokens))
        return None if last == 0 else (1, last)


@dataclass(frozen=True)
class Row:
    """One component: see `fgtp plan --json`. Bytes and messages are those of one rank.

    tpot_change_range_ms: the lowest and the highest that the constants allow.
    """

    component: str
    group_size: int
    sites: int
    weight_bytes: int
    bytes_saved_per_rank: int
    bytes_moved_per_step: int
    messages_per_step: int
    tpot_change_ms: float
    tpot_change_range_ms: tuple[float, float]
    pays_at_tokens_per_rank: Range | None


def estimate(
    shapes: Mapping[str, ComponentShape], cluster: Cluster, sizes: Mapping[str, int], tokens: int
) -> list[Row]:
    """One row per component. tokens: of one rank in one step; sizes: 1 or missing for off."""
    rows = []
    for name, shape in shapes.items():
        size = sizes.get(name, 1)
        change = cluster.change_range(shape, size, tokens)
        moved = cluster.seconds(formulas.MOVED_BYTES, shape, size, tokens)
        cut = cluster.tensor_parallel_size
        rows.append(
            Row(
                component=name,
                group_size=size,
                sites=len(shape.sites),
                weight_bytes=round(shape.weight_bytes / cut),
                bytes_saved_per_rank=round(shape.bytes_saved(size) / cut),
                bytes_moved_per_step=round(moved),
                messages_per_step=messages(shape) if size > 1 else 0,
                tpot_change_ms=round(1e3 * change.mid, 4),
                tpot_change_range_ms=(round(1e3 * change.low, 4), round(1e3 * change.high, 4)),
                pays_at_tokens_per_rank=cluster.pays_at(shape, size),
            )
        )
    return rows


def messages(shape: ComponentShape) -> int:
    """Collectives of a component in one step."""
    return sum(len(site.collectives) for site in shape.sites)


def step_seconds(
    shapes: Mapping[str, ComponentShape],
    linears: int,
    cluster: Cluster,
    sizes: Mapping[str, int],
    tokens: int,
) -> float:
    """Seconds of a decode step of a dense model: matmuls, lookups and collectives.

    linears: elements of matmul weights that no component has (q, k and v), kept as the model's
    dtype says. Attention, norms and the host's own time are left out; `fgtp_pass.cost.layout` has
    them.
    """
    rest = ComponentShape("", (), (), next(iter(shapes.values())).dtype)
    others = {**cluster.values(rest), formulas.ELEMENTS: linears, formulas.TOKENS: tokens}
    total = formulas.evaluate(formulas.WHOLE_SECONDS, others)
    for name, shape in shapes.items():
        total += cluster.seconds(formulas.SHARDED_SECONDS, shape, sizes.get(name, 1), tokens)
    return total

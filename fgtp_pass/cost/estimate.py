"""What a plan saves and costs on given hardware: the formulas, evaluated."""

from collections.abc import Mapping
from dataclasses import dataclass

import sympy
from sympy import Expr, Symbol

from fgtp_pass.cost import formulas
from fgtp_pass.cost.hardware import Hardware
from fgtp_pass.cost.shape import ComponentShape

Range = tuple[int, int | None]


@dataclass(frozen=True)
class Cluster:
    """Where a plan runs: data-parallel ranks, one device each, in nodes of equal devices."""

    hardware: Hardware
    data_parallel_size: int
    ranks_per_node: int

    def values(self, shape: ComponentShape) -> dict[Symbol, float]:
        """The numbers of all symbols for a component here, but for TOKENS and GROUP."""
        nodes = {formulas.RANKS_PER_NODE: min(self.ranks_per_node, self.data_parallel_size)}
        return {
            **shape.values(),
            **self.hardware.values(shape.precision.matmul_dtype),
            **nodes,
        }

    def change(self, shape: ComponentShape, group_size: int) -> Expr:
        """Change of a step's seconds by cutting the component, as an expression in TOKENS."""
        values = {**self.values(shape), formulas.GROUP: group_size}
        return formulas.substitute(formulas.CHANGE_SECONDS, values)

    def change_seconds(self, shape: ComponentShape, group_size: int, tokens: int) -> float:
        """Predicted change of a step's seconds; below 0 is a gain. 0 for a group of one."""
        values = {**self.values(shape), formulas.GROUP: group_size, formulas.TOKENS: tokens}
        return formulas.evaluate(formulas.CHANGE_SECONDS, values)

    def pays_at(self, shape: ComponentShape, group_size: int) -> Range | None:
        """The first and last tokens per rank at which cutting gains time; None if it never does.

        The last is None where there is no end to it.
        """
        if group_size == 1:
            return None
        end = formulas.pays_until(self.change(shape, group_size))
        if end == sympy.oo:
            return 1, None
        last = int(sympy.ceiling(end)) - 1  # at the crossover itself nothing is gained
        return (1, last) if last >= 1 else None


@dataclass(frozen=True)
class Row:
    """One component: see `fgtp plan --json`. Bytes and messages are those of one rank."""

    component: str
    group_size: int
    sites: int
    weight_bytes: int
    bytes_saved_per_rank: int
    bytes_moved_per_step: int
    messages_per_step: int
    tpot_change_ms: float
    pays_at_tokens_per_rank: Range | None


def estimate(
    shapes: Mapping[str, ComponentShape], cluster: Cluster, sizes: Mapping[str, int], tokens: int
) -> list[Row]:
    """One row per component. tokens: of one rank in one step; sizes: 1 or missing for off."""
    rows = []
    for name, shape in shapes.items():
        size = sizes.get(name, 1)
        values = {**cluster.values(shape), formulas.GROUP: size, formulas.TOKENS: tokens}
        messages = sum(len(site.collectives) for site in shape.sites) if size > 1 else 0
        rows.append(
            Row(
                component=name,
                group_size=size,
                sites=len(shape.sites),
                weight_bytes=round(shape.weight_bytes),
                bytes_saved_per_rank=round(shape.bytes_saved(size)),
                bytes_moved_per_step=round(formulas.evaluate(formulas.MOVED_BYTES, values)),
                messages_per_step=messages,
                tpot_change_ms=round(1e3 * cluster.change_seconds(shape, size, tokens), 4),
                pays_at_tokens_per_rank=cluster.pays_at(shape, size),
            )
        )
    return rows


def step_seconds(
    shapes: Mapping[str, ComponentShape],
    linears: int,
    cluster: Cluster,
    sizes: Mapping[str, int],
    tokens: int,
) -> float:
    """Seconds of a decode step of a dense model: matmuls, lookups and collectives.

    linears: elements of matmul weights that no component has (q, k and v), kept as the model's
    dtype says. Attention, norms and the host's own time are left out.
    """
    rest = ComponentShape("", (), (), next(iter(shapes.values())).precision)
    others = {**cluster.values(rest), formulas.ELEMENTS: linears, formulas.TOKENS: tokens}
    total = formulas.evaluate(formulas.WHOLE_SECONDS, others)
    for name, shape in shapes.items():
        values = {
            **cluster.values(shape),
            formulas.GROUP: sizes.get(name, 1),
            formulas.TOKENS: tokens,
        }
        total += formulas.evaluate(formulas.SHARDED_SECONDS, values)
    return total

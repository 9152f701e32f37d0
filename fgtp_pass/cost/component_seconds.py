"""What each component takes in a step, along the fastest of the ways that this software takes."""

from collections.abc import Mapping
from typing import NamedTuple

from sympy import Expr

from fgtp_pass.cost import formulas
from fgtp_pass.cost.estimate import Cluster
from fgtp_pass.cost.shape import ComponentShape
from fgtp_pass.cost.uncertainty import Scale


class Seconds(NamedTuple):
    """What a component takes in a step: its matmuls and lookups, and what its group moves."""

    computing: float
    moving: float


def component_seconds(
    shapes: Mapping[str, ComponentShape],
    joined: Mapping[str, ComponentShape],
    cluster: Cluster,
    sizes: Mapping[str, int],
    tokens: Mapping[str, int],
    scale: Scale | None = None,
) -> dict[str, Seconds]:
    """By component. sizes: 1 or missing for off. tokens: of one rank, by component.

    Each site by itself moves its tokens or, where it may, its weights. The sites of `joined` share
    stretches where all of these have one size, and then move tokens.
    """

    def seconds(shape: ComponentShape, may_gather: bool) -> Seconds:
        name = shape.component

        def of(*expressions: Expr) -> Seconds:
            priced = (
                cluster.seconds(one, shape, sizes.get(name, 1), tokens[name], scale)
                for one in expressions
            )
            return Seconds(*priced)

        tokens_move = of(formulas.COMPUTING_SECONDS, formulas.COLLECTIVES_SECONDS)
        if not may_gather:
            return tokens_move
        return min(tokens_move, of(formulas.WHOLE_SECONDS, formulas.GATHERING_SECONDS), key=sum)

    apart = {name: seconds(shape, shape.may_gather) for name, shape in shapes.items()}
    size, *others = {sizes.get(name, 1) for name in joined} or {1}
    if size == 1 or others:
        return apart
    together = apart | {name: seconds(shape, False) for name, shape in joined.items()}
    return min(apart, together, key=lambda way: sum(map(sum, way.values())))

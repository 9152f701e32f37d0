"""What a path through the placement algebra takes, for paths that are compared by time."""

from collections.abc import Callable
from functools import cache

import sympy
from sympy import Expr

from fgtp_pass.algebra.path import Path
from fgtp_pass.algebra.placement import Collective
from fgtp_pass.cost import formulas
from fgtp_pass.cost.estimate import Cluster
from fgtp_pass.plan.plan import itemsize

Seconds = Callable[[Path, int, int, str], float]


def path_seconds(cluster: Cluster) -> Seconds:
    """Predicts by path, tokens per rank, ranks of the group, and dtype of the weights (`float32`).

    Its collectives; and what the weights that it gathers whole cost beyond cut ones: to gather
    them, and to read all of them in place of 1/k. The matmuls of cut weights are left out, since
    they are the same on every path. No message is hidden behind compute, though a gathered
    weight's may be: so a crossover to weights comes rather too late than too early.
    """

    @cache
    def seconds(path: Path, tokens: int, group_size: int, dtype: str) -> float:
        known = {**cluster.constants(dtype), formulas.GROUP: group_size}

        def collectives(kinds: list[tuple[Collective, float]], of_tokens: int) -> float:
            values = {**known, formulas.TOKENS: of_tokens}
            for kind in Collective:
                widths = [width for one, width in kinds if one is kind]
                values |= {formulas.COUNT[kind]: len(widths), formulas.WIDTH[kind]: sum(widths)}
            return formulas.evaluate(formulas.COLLECTIVES_SECONDS, values)

        total = collectives([*zip(path.collectives, path.widths, strict=True)], tokens)
        if not path.gathered:
            return total
        own_part = path.gathered_bytes / group_size / path.gathered
        total += collectives([(Collective.ALL_GATHER, own_part)] * path.gathered, 1)
        element = itemsize(dtype)
        weights = {
            formulas.MATMULS: path.gathered,
            formulas.ELEMENTS: path.gathered_bytes / element,
            formulas.ELEMENT_BYTES: element,
            formulas.TOKENS: tokens,
        }
        return total + formulas.evaluate(_WHOLE_FOR_CUT, {**known, **weights})

    return seconds


_WHOLE_FOR_CUT: Expr = formulas.matmul_seconds(
    formulas.TOKENS, sympy.Integer(1)
) - formulas.matmul_seconds(formulas.GROUP * formulas.TOKENS, formulas.GROUP)

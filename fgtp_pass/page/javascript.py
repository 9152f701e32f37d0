"""The cost formulas as JavaScript functions: printed by sympy, written nowhere else."""

import re
from collections.abc import Mapping

from sympy import Expr, jscode

from fgtp_pass.cost import formulas, layout_formulas

# what the page computes, by the names of its functions
EXPRESSIONS: Mapping[str, Expr] = {
    "changeSeconds": formulas.CHANGE_SECONDS,
    "computingSeconds": formulas.COMPUTING_SECONDS,
    "collectivesSeconds": formulas.COLLECTIVES_SECONDS,
    "wholeSeconds": formulas.WHOLE_SECONDS,
    "gatheringSeconds": formulas.GATHERING_SECONDS,
    "movedBytes": formulas.MOVED_BYTES,
    "linearsSeconds": layout_formulas.LINEARS_SECONDS,
    "attentionSeconds": layout_formulas.ATTENTION_SECONDS,
    "expertsSeconds": layout_formulas.EXPERTS_SECONDS,
    "exchangeSeconds": layout_formulas.EXCHANGE_SECONDS,
    "tensorParallelSeconds": layout_formulas.TENSOR_PARALLEL_SECONDS,
    "fixedSeconds": layout_formulas.FIXED_SECONDS,
    "cacheBytes": layout_formulas.CACHE_BYTES,
}


def javascript() -> str:
    """`const FORMULAS`: per expression a function of an object with a number for each symbol."""
    lines = [f"  {name}: {_function(expression)}," for name, expression in EXPRESSIONS.items()]
    return "\n".join(["const FORMULAS = {", *lines, "};"])


def _function(expression: Expr) -> str:
    symbols = ", ".join(sorted(map(str, expression.free_symbols)))
    code = re.sub(r"\s+", " ", jscode(expression))
    return f"({{ {symbols} }}) => {code}"

"""How far off a prediction may be, and which constant decides.

Constants carry a spread. Those that are wrong together, such as the latencies of one class of link,
are one group; groups are taken to be independent, so their effects add up as squares.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

from sympy import Symbol

from fgtp_pass.cost import formulas, layout_formulas

Scale = Mapping[Symbol, float]


@cache
def groups() -> Mapping[str, tuple[Symbol, ...]]:
    """The constants of each group of `Hardware.spreads`."""
    found: dict[str, tuple[Symbol, ...]] = {
        "memory bandwidth": (formulas.MEMORY_BANDWIDTH,),
        "matmul rate": (formulas.MATMUL_RATE,),
        "time per matmul": (formulas.MATMUL_SECONDS,),
        "time per layer": (layout_formulas.LAYER_SECONDS,),
        "expert imbalance": (layout_formulas.IMBALANCE,),
    }
    latencies = (
        *(formulas.BASE_SECONDS, formulas.PEER_SECONDS),
        *(formulas.SMALL_BASE_SECONDS, formulas.SMALL_PEER_SECONDS),
    )
    bandwidths = (formulas.LINK_BANDWIDTH, formulas.SMALL_BANDWIDTH, formulas.PEER_BANDWIDTH)
    for link in formulas.LINK_CLASSES:
        for name, constants, own in (
            ("latency", latencies, layout_formulas.EXPERT_LINK_BASE),
            ("bandwidth", bandwidths, layout_formulas.EXPERT_LINK_BANDWIDTH),
        ):
            found[f"{name} {link.replace('_', ' ')}"] = (
                *(one for by_kind in constants for (at, _), one in by_kind.items() if at == link),
                own[link],
            )
    return found


@dataclass(frozen=True)
class Predicted:
    """A prediction with its range.

    by_group: what each group of constants can take it down and up by, the largest first.
    """

    low: float
    mid: float
    high: float
    by_group: Mapping[str, tuple[float, float]]

    @property
    def certain(self) -> bool:
        """Whether the sign is the same all over the range."""
        return self.low > 0 or self.high < 0

    def scaled(self, factor: float) -> "Predicted":
        by_group = {k: (factor * low, factor * high) for k, (low, high) in self.by_group.items()}
        return Predicted(factor * self.low, factor * self.mid, factor * self.high, by_group)


def predict(compute: Callable[[Scale], float], spreads: Mapping[str, float]) -> Predicted:
    """A prediction under the spreads of its constants.

    compute: the prediction, with some constants multiplied by a factor each. A constant with spread
    s is taken to lie between 1 / (1 + s) of its value and 1 + s of it.
    """
    mid = compute({})
    effects: dict[str, tuple[float, float]] = {}
    for name, symbols in groups().items():
        spread = spreads.get(name, 0)
        if not spread:
            continue
        moved = [
            compute(dict.fromkeys(symbols, factor)) - mid
            for factor in (1 / (1 + spread), 1 + spread)
        ]
        effects[name] = (min(0, *moved), max(0, *moved))
    low, high = (math.hypot(*(effect[side] for effect in effects.values())) for side in (0, 1))
    ordered = sorted(effects.items(), key=lambda item: item[1][0] - item[1][1])
    return Predicted(mid - low, mid, mid + high, dict(ordered))

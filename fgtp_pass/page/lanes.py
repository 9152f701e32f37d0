"""The sites of one layer and of what stands around the layers, each as a lane to draw."""

import re
from collections import Counter
from collections.abc import Iterable
from itertools import groupby
from typing import Any

from fgtp_pass.cost.shape import ComponentShape
from fgtp_pass.plan.plan import Site, WeightCut


def lanes(shapes: Iterable[ComponentShape]) -> list[dict[str, Any]]:
    """One lane per component: its site in the layer with most components, or else its first."""
    sites = [site for shape in shapes for site in shape.sites]
    layers = Counter(layer for site in sites if (layer := _layer(site)) is not None)
    shown = min(layers, key=lambda layer: (-layers[layer], layer), default=None)
    counts = Counter(site.component for site in sites)
    found: list[dict[str, Any]] = []
    for name, count in counts.items():
        of_it = [site for site in sites if site.component == name]
        site = next((site for site in of_it if _layer(site) in (shown, None)), of_it[0])
        found.append(_lane(site, count))
    return found


def _layer(site: Site) -> int | None:
    """The number of the layer that the site is in: the first number in its weights' names."""
    found = re.search(r"\.(\d+)\.", site.weights[0].fqn)
    return int(found[1]) if found else None


def _lane(site: Site, count: int) -> dict[str, Any]:
    layer = _layer(site)
    widths = iter(site.widths)
    stages = iter(_stages(site))
    steps: list[dict[str, Any]] = []
    for move, applied, placement in re.findall(r"(?:-(\w+)->|x W\[(\w+)/k\] ->) (\w+)", site.path):
        if move:
            steps.append({"move": move, "width": next(widths), "to": placement})
        else:
            weights = next(stages, [])
            steps.append({"cut": applied, "weights": weights, "to": placement})
    return {
        "component": site.component,
        "where": "outside the layers" if layer is None else f"layer {layer}",
        "count": count,
        "path": site.path,
        "steps": steps,
    }


def _stages(site: Site) -> list[list[dict[str, Any]]]:
    """The weight matrices of each stage: runs of matrices that are cut along the same dim."""
    matrices = [weight for weight in site.weights if len(weight.shape) == 2]
    runs = [list(run) for _, run in groupby(matrices, key=lambda weight: weight.cut_dim)]
    if len(runs) != len(site.cuts):
        runs = [matrices]
    return [[_matrix(weight) for weight in run] for run in runs]


def _matrix(weight: WeightCut) -> dict[str, Any]:
    return {
        "name": weight.fqn.removesuffix(".weight").rpartition(".")[2],
        "shape": list(weight.shape),
        "cut_dim": weight.cut_dim,
        "blocks": weight.blocks,
    }

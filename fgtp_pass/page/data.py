"""What the page knows of a report, as plain values for JSON."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Any

from fgtp_pass.cost import formulas, spelling
from fgtp_pass.cost.advice import Choice, choose_sizes
from fgtp_pass.cost.estimate import Cluster
from fgtp_pass.cost.hardware import Hardware, load, profiles
from fgtp_pass.cost.memory import USABLE, rank_memory, tensor_parallel, weights_by_part
from fgtp_pass.cost.report import Report
from fgtp_pass.cost.shape import ComponentShape
from fgtp_pass.plan import Site, WeightCut
from fgtp_pass.sizes import divisors

# tokens per rank that the slider stops at
_STOPS = (*(2**i for i in range(11)), *(3 * 2**i for i in range(1, 9)))

_DERIVED = (
    ("Matmuls", formulas.matmul_seconds),
    ("Lookups", formulas.lookup_seconds),
    ("Collectives", formulas.collectives_seconds),
)


def page_data(report: Report) -> dict[str, Any]:
    """All that page/*.js reads, as its constant DATA.

    Everything that is no formula of tokens, group and hardware comes as a table over the settings
    that the page offers: bytes saved by group size, recommended sizes by hardware and tokens.
    """
    summary, cluster, load_ = report.summary, report.cluster, report.load
    size = cluster.data_parallel_size
    parts = weights_by_part(summary, report.shapes, load_)
    stops = sorted({*_STOPS, load_.batch})
    devices = _devices(cluster.hardware)
    advised = {device.name: _advised(report, device, stops) for device in devices}
    uniform = [dict.fromkeys(report.shapes, k) for k in divisors(size)]
    recommended = [choice.sizes for choices in advised.values() for choice in choices]
    return {
        "model": {
            "name": summary.name,
            "architecture": summary.architecture,
            "layers": summary.layers,
            "weights": load_.quantization or summary.dtype,
        },
        "data_parallel_size": size,
        "ranks_per_node": cluster.ranks_per_node,
        "batch": load_.batch,
        "context": load_.context,
        "objective": report.objective,
        "hardware": cluster.hardware.name,
        "asked": None if report.sizes == report.choice.sizes else dict(report.sizes),
        "token_stops": stops,
        "group_sizes": divisors(size),
        "components": [_component(shape, size) for shape in report.shapes.values()],
        "node_values": {str(formulas.RANKS_PER_NODE): min(cluster.ranks_per_node, size)},
        "experts_bytes": parts["experts"] / size,
        "others_bytes": parts["others"],
        "kv_bytes_per_sequence": report.whole.kv_bytes / load_.batch,
        "latent": None
        if report.latent is None
        else {
            "tensor_parallel_bytes": report.latent.tensor_parallel_bytes / load_.batch,
            "data_parallel_bytes": report.latent.data_parallel_bytes / load_.batch,
        },
        "devices": [_device(device, report, advised[device.name]) for device in devices],
        "commands": {
            _key(sizes): _command(report, sizes) for sizes in (*uniform, *recommended, report.sizes)
        },
        "lanes": _lanes(report.shapes.values(), divisors(size)),
        "usable_share": USABLE,
        "derivations": [
            {"title": title, "text": _paragraphs(function.__doc__)} for title, function in _DERIVED
        ],
    }


def _devices(given: Hardware) -> list[Hardware]:
    """The profiles and the report's own device, from slow memory to fast."""
    known = {name: load(name) for name in profiles()} | {given.name: given}
    return sorted(known.values(), key=lambda device: device.memory_bandwidth.value)


def _advised(report: Report, device: Hardware, stops: Iterable[int]) -> list[Choice]:
    cluster = Cluster(device, report.cluster.data_parallel_size, report.cluster.ranks_per_node)
    return [choose_sizes(report.shapes, cluster, stop, report.objective) for stop in stops]


def _device(device: Hardware, report: Report, advised: list[Choice]) -> dict[str, Any]:
    dtypes = {shape.precision.matmul_dtype for shape in report.shapes.values()}
    size = report.cluster.data_parallel_size
    replica = tensor_parallel(report.summary, report.load, device, report.cluster.ranks_per_node)
    return {
        "name": device.name,
        "title": device.title,
        "values": {dtype: _named(device.values(dtype)) for dtype in dtypes},
        "usable_bytes": rank_memory(report.summary, report.load, device, size, {}).usable_bytes,
        "constants": device.constants(),
        "replica": {
            "tensor_parallel_size": replica.tensor_parallel_size,
            "pipeline_parallel_size": replica.pipeline_parallel_size,
            "reason": replica.reason,
        },
        "recommended": [
            {"sizes": dict(choice.sizes), "reasons": dict(choice.reasons)} for choice in advised
        ],
    }


def _component(shape: ComponentShape, data_parallel_size: int) -> dict[str, Any]:
    return {
        "name": shape.component,
        "sites": len(shape.sites),
        "dtype": shape.precision.matmul_dtype,
        "values": _named(shape.values()),
        "weight_bytes": shape.weight_bytes,
        "bytes_saved": {str(k): shape.bytes_saved(k) for k in divisors(data_parallel_size)},
        "messages": sum(len(site.collectives) for site in shape.sites),
    }


def _named(values: Mapping[Any, Any]) -> dict[str, float]:
    return {str(symbol): float(value) for symbol, value in values.items()}


def _key(sizes: Mapping[str, int]) -> str:
    return ",".join(str(size) for size in sizes.values())


def _command(report: Report, sizes: Mapping[str, int]) -> str:
    summary = report.summary
    return spelling.vllm_command(
        summary.name,
        report.cluster.data_parallel_size,
        sizes,
        summary.keys,
        expert_parallel=summary.experts > 0,
    )


def _paragraphs(docstring: str | None) -> list[str]:
    return [" ".join(part.split()) for part in (docstring or "").split("\n\n")]


# the diagram ------------------------------------------------------------------------------------


def _lanes(shapes: Iterable[ComponentShape], group_sizes: list[int]) -> list[dict[str, Any]]:
    """The sites of one layer and of what stands around the layers, each as a lane to draw.

    The layer is the first of those with most components.
    """
    sites = [site for shape in shapes for site in shape.sites]
    layers = Counter(layer for site in sites if (layer := _layer(site)) is not None)
    shown = min(layers, key=lambda layer: (-layers[layer], layer), default=None)
    counts = Counter(site.component for site in sites)
    lanes = {
        site.component: _lane(site, counts[site.component], group_sizes)
        for site in reversed(sites)
        if _layer(site) in (shown, None)
    }
    return [lanes[name] for name in counts if name in lanes]


def _layer(site: Site) -> int | None:
    """The number of the layer that the site is in: the first number in its weights' names."""
    found = re.search(r"\.(\d+)\.", site.weights[0].fqn)
    return int(found[1]) if found else None


def _lane(site: Site, count: int, group_sizes: list[int]) -> dict[str, Any]:
    layer = _layer(site)
    widths = iter(site.widths)
    stages = iter(_stages(site, group_sizes))
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


def _stages(site: Site, group_sizes: list[int]) -> list[list[dict[str, Any]]]:
    """The weight matrices of each stage: runs of matrices that are cut along the same dim."""
    matrices = [weight for weight in site.weights if len(weight.shape) == 2]
    runs = [list(run) for _, run in groupby(matrices, key=lambda weight: weight.cut_dim)]
    if len(runs) != len(site.cuts):
        runs = [matrices]
    return [[_matrix(weight, group_sizes) for weight in run] for run in runs]


def _matrix(weight: WeightCut, group_sizes: list[int]) -> dict[str, Any]:
    return {
        "name": weight.fqn.removesuffix(".weight").rpartition(".")[2],
        "shape": list(weight.shape),
        "cut_dim": weight.cut_dim,
        "blocks": weight.blocks,
        "shards": {str(k): list(weight.shard_shape(k)) for k in group_sizes},
    }

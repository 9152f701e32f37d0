"""What the page knows of a report, as plain values for JSON."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from fgtp_pass.cost import formulas, layout_formulas, uncertainty
from fgtp_pass.cost.advice import tied
from fgtp_pass.cost.commands import ASCEND, vllm_quantization
from fgtp_pass.cost.hardware import Hardware, load, profiles
from fgtp_pass.cost.layout import NO_LIMIT, PARTS, Deployment
from fgtp_pass.cost.links import Link
from fgtp_pass.cost.quantization import SCHEMES, Scheme
from fgtp_pass.cost.report import Report
from fgtp_pass.cost.shape import ComponentShape
from fgtp_pass.page.lanes import lanes
from fgtp_pass.plan.plan import WeightCut, itemsize

_DERIVED = (
    ("Matmuls", formulas.matmul_seconds),
    ("Lookups", formulas.lookup_seconds),
    ("Collectives", formulas.collective_seconds),
    ("Other matmuls", layout_formulas.linears_seconds),
    ("Attention", layout_formulas.attention_seconds),
    ("Experts", layout_formulas.experts_seconds),
    ("Experts' all_to_all", layout_formulas.exchange_seconds),
    ("Tensor parallelism", layout_formulas.tensor_parallel_seconds),
)

# what the page offers between nodes: kind and Gbit/s per device
_NETWORKS = (
    ("infiniband", 400),
    ("infiniband", 200),
    ("roce", 400),
    ("roce", 200),
    ("ethernet", 100),
    ("ethernet", 25),
)


def page_data(report: Report) -> dict[str, Any]:
    """All that page/*.js reads, as its constant DATA."""
    summary, deployment = report.summary, report.deployment
    devices = _devices(report.hardware)
    schemes = _schemes(report)
    return {
        "model": {
            "name": summary.name,
            "architecture": summary.architecture,
            "layers": summary.layers,
            "dtype": summary.dtype,
            "item_bytes": itemsize(summary.dtype),
            "heads": summary.attention_heads,
            "hidden": summary.hidden,
            "has_experts": summary.experts is not None,
            "latent": summary.latent,
            "has_draft": summary.draft is not None,
            "draft_layers": summary.draft.layers if summary.draft else 0,
            "vectors_bytes": summary.vectors * itemsize(summary.dtype),
            "declared": summary.scheme.name if summary.scheme else "none",
            "kv_dtype": summary.cache_dtype,
            "cache_assumed": summary.cache_assumed,
        },
        "start": _start(report, schemes),
        "ascend": list(ASCEND),
        "objectives": ["balanced", "latency", "memory"],
        "parts": list(PARTS),
        "usable_share": deployment.usable_share,
        "no_limit": NO_LIMIT,
        "components": [_component(name, report, schemes) for name in report.shapes],
        "tied": [list(names) for names in tied(report.shapes)],
        "kinds": [_kind(deployment, kind) for kind in summary.attention],
        "schemes": {
            name: _scheme(replace(deployment, load=replace(report.load, scheme=scheme)))
            for name, scheme in schemes.items()
        },
        "devices": [_device(device, report, schemes.values()) for device in devices],
        "networks": {f"{kind} {gbps}": _across(kind, gbps) for kind, gbps in _NETWORKS},
        "groups": {
            name: [str(symbol) for symbol in symbols]
            for name, symbols in uncertainty.groups().items()
        },
        "lanes": lanes(report.shapes.values()),
        "derivations": [
            {"title": title, "text": _paragraphs(function.__doc__)} for title, function in _DERIVED
        ],
    }


def _start(report: Report, schemes: Mapping[str, Scheme | None]) -> dict[str, Any]:
    """The state that the page opens with: what was asked for."""
    load_, target = report.load, report.comparison.target
    return {
        "hardware": report.hardware.name,
        "devices": report.devices,
        "node": report.deployment.devices_per_node,
        "network": "profile",
        "sequences": load_.sequences,
        "input": load_.input_tokens,
        "output": load_.output_tokens,
        "weights": next(name for name, scheme in schemes.items() if scheme == load_.scheme),
        "kv": load_.cache_dtype or "auto",
        "mtp": load_.draft,
        "objective": report.objective,
        "target": 0 if target is None else 1e3 * target,
        "latency": 1,
        "sizes": dict(report.asked) if report.asked else {},
    }


def _schemes(report: Report) -> dict[str, Scheme | None]:
    """The schemes that the page offers: none, the named ones, and the checkpoint's own."""
    found: dict[str, Scheme | None] = {"none": None, **SCHEMES}
    declared = report.summary.scheme
    if declared is not None and declared.rules and declared not in found.values():
        found[f"checkpoint ({declared.name})"] = declared
    return found


def _devices(given: Hardware) -> list[Hardware]:
    """The profiles and the report's own device, from slow memory to fast."""
    known = {name: load(name) for name in profiles()} | {given.name: given}
    return sorted(known.values(), key=lambda device: device.memory_bandwidth.value)


def _device(device: Hardware, report: Report, schemes: Iterable[Scheme | None]) -> dict[str, Any]:
    rules = [rule for scheme in schemes if scheme is not None for rule in scheme.rules]
    dtypes = {report.summary.dtype, *(rule.matmul_dtype for rule in rules)} - {None}
    return {
        "name": device.name,
        "title": device.title,
        "family": device.family,
        "node": device.devices_per_node,
        "memory": device.memory.value,
        "values": _named(device.values(report.summary.dtype)),
        "rates": {str(dtype): device.matmul_rate(str(dtype)) for dtype in dtypes},
        "spreads": device.spreads,
        "constants": device.constants(),
    }


def _across(kind: str, gigabits: float) -> dict[str, dict[str, float]]:
    """The symbols of a network between nodes, and how far off they may be."""
    given = {"kind": kind, "bytes_per_second": gigabits * 1e9 / 8, "source": ""}
    any_device = load(next(iter(profiles())))
    device = any_device.model_copy(update={"across_nodes": Link.model_validate(given)})
    values = _named(device.values("bfloat16"))
    return {
        "values": {
            name: value for name, value in values.items() if name.startswith("across_nodes")
        },
        "spreads": {name: s for name, s in device.spreads.items() if name.endswith("across nodes")},
    }


def _component(name: str, report: Report, schemes: Mapping[str, Scheme | None]) -> dict[str, Any]:
    shape, joined = report.shapes[name], report.deployment.joined.get(name)
    keys = {known.component: known.config_key for known in report.summary.keys}
    under = {scheme: replace(shape, scheme=one) for scheme, one in schemes.items()}
    return {
        "name": name,
        "key": keys.get(name, name),
        "order": [*keys, name].index(name),
        "sites": len(shape.sites),
        "messages": sum(len(site.collectives) for site in shape.sites),
        "sees_last_tokens": shape.outputs(report.summary.vocabulary),
        "values": _sums(shape),
        "joined": _sums(joined) if joined else None,
        "precision": {
            scheme: {
                "element_bytes": one.precision.element_bytes,
                "dtype": one.precision.matmul_dtype,
                "may_gather": one.may_gather,
            }
            for scheme, one in under.items()
        },
        "weights": _weights(shape, under),
    }


def _sums(shape: ComponentShape) -> dict[str, float]:
    """Its sums over its sites, by symbol, but for what the scheme decides."""
    values = _named(shape.values())
    del values[str(formulas.ELEMENT_BYTES)]
    return values


def _weights(shape: ComponentShape, under: Mapping[str, ComponentShape]) -> list[dict[str, Any]]:
    """The cut weights, alike ones together: elements, width and blocks of the dim that is cut, and
    bytes of an element by scheme.
    """

    def alike(weight: WeightCut) -> tuple[Any, ...]:
        bytes_ = tuple(one.element_bytes(weight) for one in under.values())
        return math.prod(weight.shape), weight.shape[weight.dim], weight.blocks, bytes_

    return [
        {
            "count": count,
            "elements": elements,
            "width": width,
            "blocks": blocks,
            "bytes": dict(zip(under, bytes_, strict=True)),
        }
        for (elements, width, blocks, bytes_), count in Counter(map(alike, shape.weights)).items()
    ]


def _kind(deployment: Deployment, kind: Any) -> dict[str, float]:
    """One kind of attention; the page makes kept_bytes of its width and the cache's dtype."""
    values = _named(deployment.kind_values(kind))
    del values[str(layout_formulas.KEPT_BYTES)]
    return {**values, "width": kind.width}


def _scheme(deployment: Deployment) -> dict[str, Any]:
    """What a scheme decides beside the components' weights."""
    summary = deployment.summary
    draft = summary.draft
    expert = deployment.precision(summary.experts.weights) if summary.experts else None
    count = partial(_bytes, deployment)
    return {
        "values": _named(deployment.model_values()),
        "linears_dtype": deployment.precision(summary.linears).matmul_dtype,
        "experts_dtype": expert.matmul_dtype if expert else summary.dtype,
        "linears_bytes": count(summary.linears),
        "replicated_bytes": count(summary.replicated),
        "experts_bytes": count(summary.experts.weights) if summary.experts else 0,
        "draft_linears_bytes": count(draft.linears) if draft else 0,
        "draft_experts_bytes": count(draft.experts) if draft else 0,
        "quantization": _flag(deployment),
    }


def _bytes(deployment: Deployment, weights: Any) -> float:
    return float(weights.elements * deployment.precision(weights).element_bytes)


def _flag(deployment: Deployment) -> str:
    """vLLM's value of --quantization for a scheme that it makes while it loads, or ""."""
    flags, _ = vllm_quantization(deployment)
    return flags[1] if flags else ""


def _named(values: Mapping[Any, Any]) -> dict[str, float]:
    return {str(symbol): float(value) for symbol, value in values.items()}


def _paragraphs(docstring: str | None) -> list[str]:
    return [" ".join(part.split()) for part in (docstring or "").split("\n\n")]

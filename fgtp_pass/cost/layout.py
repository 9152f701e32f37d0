"""A layout of a model over devices: what a step takes under it, and what fits."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from sympy import Expr, Symbol

from fgtp_pass.algebra.placement import Collective
from fgtp_pass.cost import formulas, layout_formulas
from fgtp_pass.cost.component_seconds import component_seconds
from fgtp_pass.cost.estimate import Cluster
from fgtp_pass.cost.hardware import Hardware
from fgtp_pass.cost.model_summary import AttentionKind, ModelSummary, Weights
from fgtp_pass.cost.quantization import Precision, Scheme, cache_element_bytes
from fgtp_pass.cost.shape import ComponentShape, component_shapes
from fgtp_pass.cost.uncertainty import Predicted, Scale, predict
from fgtp_pass.plan.plan import itemsize

# Of a device's memory; the rest is for activations, graphs and the runtime. vLLM takes 92 % by
# default, and what its graphs and activations need from that.
USABLE = 0.9
# stands for no limit, where infinity would not survive JSON
NO_LIMIT = 1e15

# the parts of a step, in the order in which they are shown
PARTS = (
    *("dense matmuls", "attention", "experts", "experts' all_to_all", "tensor parallelism"),
    *("fine-grained collectives", "the rest"),
)


@dataclass(frozen=True)
class Load:
    """What all devices together serve.

    sequences: in flight. input_tokens: of a prompt. output_tokens: that follow it. scheme: of the
    weights. cache_dtype: of the KV cache, None for the model's. draft: whether the layers for
    multi-token prediction are loaded.
    """

    sequences: int
    input_tokens: int
    output_tokens: int = 0
    scheme: Scheme | None = None
    cache_dtype: str | None = None
    draft: bool = False

    @property
    def context(self) -> int:
        """Tokens that a sequence has in the cache at its end."""
        return self.input_tokens + self.output_tokens

    @property
    def mean_context(self) -> float:
        """Tokens that it has in the middle of its output."""
        return self.input_tokens + self.output_tokens / 2


@dataclass(frozen=True)
class Layout:
    """How devices share a model.

    data_parallel_size: ranks with sequences of their own. expert_parallel: whether routed experts
    lie over the devices of all of them, or each has all. sizes: of component groups, over
    data-parallel ranks; 1 or missing for off.
    """

    tensor_parallel_size: int = 1
    data_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    expert_parallel: bool = False
    sizes: Mapping[str, int] = field(default_factory=dict)

    @property
    def devices(self) -> int:
        return self.tensor_parallel_size * self.data_parallel_size * self.pipeline_parallel_size

    @property
    def fine_grained(self) -> bool:
        return any(size > 1 for size in self.sizes.values())

    @property
    def name(self) -> str:
        """Such as "TP4 x 2 replicas" or "TP2 x DP16 + EP + sizes"."""
        cut, ranks = self.tensor_parallel_size, self.data_parallel_size
        stages = self.pipeline_parallel_size
        one = f"TP{cut}" + (f" x PP{stages}" if stages > 1 else "")
        if not self.expert_parallel and not self.fine_grained:
            if ranks == 1:
                return one
            return f"{ranks} replicas" if one == "TP1" else f"{one} x {ranks} replicas"
        together = f"DP{ranks}" if one == "TP1" else f"{one} x DP{ranks}"
        with_experts = " + EP" if self.expert_parallel else ""
        return together + with_experts + (" + sizes" if self.fine_grained else "")


@dataclass(frozen=True)
class Deployment:
    """A model on devices under a load: prices any layout of it."""

    summary: ModelSummary
    hardware: Hardware
    load: Load
    devices_per_node: int
    usable_share: float = USABLE

    @cached_property
    def shapes(self) -> dict[str, ComponentShape]:
        return component_shapes(self.summary.plan, self.summary.dtype, self.load.scheme)

    @cached_property
    def joined(self) -> dict[str, ComponentShape]:
        """The components whose sites share stretches where both have one size."""
        if self.summary.joined is None:
            return {}
        return component_shapes(self.summary.joined, self.summary.dtype, self.load.scheme)

    @cached_property
    def cache_bytes(self) -> float:
        """Bytes of one element of the KV cache."""
        return cache_element_bytes(self.summary.dtype, self.load.cache_dtype)

    def cluster(self, layout: Layout) -> Cluster:
        key = (layout.tensor_parallel_size, layout.data_parallel_size)
        if key not in self._clusters:
            cut, ranks = key
            per_node = max(1, self.devices_per_node // cut)
            self._clusters[key] = Cluster(self.hardware, ranks, per_node, cut)
        return self._clusters[key]

    @cached_property
    def _clusters(self) -> dict[tuple[int, int], Cluster]:
        return {}

    # time -----------------------------------------------------------------------------------------

    def step(self, layout: Layout, sequences: int) -> Predicted:
        """Seconds of a decode step with `sequences` in flight: the time per output token."""
        return predict(
            lambda scale: sum(self.parts(layout, sequences, scale=scale).values()),
            self.hardware.spreads,
        )

    def step_seconds(self, layout: Layout, sequences: int) -> float:
        return sum(self.parts(layout, sequences).values())

    def prefill_seconds(self, layout: Layout) -> float:
        """Seconds in which every data-parallel rank takes in one prompt."""
        return sum(self.parts(layout, layout.data_parallel_size, prefill=True).values())

    def parts(
        self,
        layout: Layout,
        sequences: int,
        *,
        prefill: bool = False,
        scale: Scale | None = None,
    ) -> dict[str, float]:
        """Seconds of a step by part. sequences: in flight, or the prompts that are taken in.

        The fullest rank sets the pace, and pipeline stages take turns, so that a rank's sequences
        are in as many batches.
        """
        ranks = layout.data_parallel_size * layout.pipeline_parallel_size
        mine = -(-sequences // ranks)
        tokens = mine * (self.load.input_tokens if prefill else 1)
        values = {
            **self.layout_values(layout),
            layout_formulas.SEQUENCES: mine,
            layout_formulas.PREFILLS: float(prefill),
            layout_formulas.CONTEXT: self._attended_context(prefill),
            formulas.TOKENS: tokens,
        }
        found = dict.fromkeys(PARTS, 0.0)
        rows = {
            name: mine if shape.outputs(self.summary.vocabulary) else tokens
            for name, shape in self.shapes.items()
        }
        cluster = self.cluster(layout)
        by_component = component_seconds(
            self.shapes, self.joined, cluster, layout.sizes, rows, scale
        )
        for seconds in by_component.values():
            found["dense matmuls"] += seconds.computing
            found["fine-grained collectives"] += seconds.moving
        for part, expression, own in self._priced():
            merged = {**values, **own}
            for symbol, factor in (scale or {}).items():
                merged[symbol] *= factor
            found[part] += formulas.evaluate(expression, merged)
        stages = layout.pipeline_parallel_size - 1
        if stages:
            found["tensor parallelism"] += stages * self._hop_seconds(tokens, scale)
        return found

    def _attended_context(self, prefill: bool) -> float:
        return max(1.0, self.load.input_tokens if prefill else self.load.mean_context)

    def _priced(self) -> Iterable[tuple[str, Expr, Mapping[Symbol, float]]]:
        """The parts of a step that are no component: an expression and the numbers that it needs
        beside the layout's.
        """
        kept = self.precision(self.summary.linears)
        dtype = self.cluster(Layout()).constants  # a matmul rate for each dtype
        linears = dtype(kept.matmul_dtype)
        own: Mapping[Symbol, float]
        yield "dense matmuls", layout_formulas.LINEARS_SECONDS, linears
        for kind in self.kinds:
            own = {**dtype(self.summary.dtype), **self.kind_values(kind)}
            yield "attention", layout_formulas.ATTENTION_SECONDS, own
        if self.summary.experts is not None:
            own = dtype(self.precision(self.summary.experts.weights).matmul_dtype)
            yield "experts", layout_formulas.EXPERTS_SECONDS, own
            yield "experts' all_to_all", layout_formulas.EXCHANGE_SECONDS, own
        yield "tensor parallelism", layout_formulas.TENSOR_PARALLEL_SECONDS, linears
        yield "the rest", layout_formulas.FIXED_SECONDS, linears

    def _hop_seconds(self, tokens: float, scale: Scale | None) -> float:
        """Seconds to hand tokens on to the next pipeline stage."""
        scale = scale or {}
        base = formulas.BASE_SECONDS["within_node", Collective.ALL_TO_ALL]
        link = formulas.LINK_BANDWIDTH["within_node", Collective.ALL_TO_ALL]
        values = self.cluster(Layout()).constants(self.summary.dtype)
        row = self.summary.hidden * itemsize(self.summary.dtype)
        latency = values[base] * scale.get(base, 1)
        return latency + tokens * row / (values[link] * scale.get(link, 1))

    @cached_property
    def kinds(self) -> tuple[AttentionKind, ...]:
        """The kinds of attention, with those of the draft layers."""
        found = [*self.summary.attention]
        if self.load.draft and self.summary.draft is not None:
            found.append(found[-1].model_copy(update={"layers": self.summary.draft.layers}))
        return tuple(found)

    def precision(self, weights: Weights) -> Precision:
        return weights.precision(self.summary.dtype, self.load.scheme, self.summary.scheme)

    def kind_values(self, kind: AttentionKind) -> dict[Symbol, float]:
        """The numbers of the symbols of one kind of attention."""
        kept = NO_LIMIT if kind.window is None else kind.window
        return {
            layout_formulas.KIND_LAYERS: kind.layers,
            layout_formulas.KEPT_BYTES: kind.width * self.cache_bytes,
            layout_formulas.KV_HEADS: max(1, kind.heads),
            layout_formulas.KEPT_LIMIT: kept,
            layout_formulas.READ_LIMIT: kept if kind.reads is None else min(kept, kind.reads),
            layout_formulas.STATE_BYTES: kind.state_bytes,
            layout_formulas.DECODE_FLOPS: kind.decode_flops,
            layout_formulas.PREFILL_FLOPS: kind.prefill_flops,
        }

    def model_values(self) -> dict[Symbol, float]:
        """The numbers of the symbols of the model, under the load's precision."""
        summary = self.summary
        linears, replicated = self.precision(summary.linears), self.precision(summary.replicated)
        width = itemsize(summary.dtype)
        found: dict[Symbol, Any] = {
            layout_formulas.LAYERS: summary.layers,
            layout_formulas.ROW: summary.hidden * width,
            layout_formulas.LOGITS_ROW: summary.vocabulary * width,
            layout_formulas.LINEARS: summary.linears.elements,
            layout_formulas.LINEAR_BYTES: linears.element_bytes,
            layout_formulas.REPLICATED: summary.replicated.elements,
            layout_formulas.REPLICATED_BYTES: replicated.element_bytes,
        }
        if summary.experts is not None:
            kept = self.precision(summary.experts.weights)
            narrow = kept.matmul_dtype in ("int8", "float8", "float4")
            found |= {
                layout_formulas.EXPERTS: summary.experts.count,
                layout_formulas.ACTIVE: summary.experts.active,
                layout_formulas.EXPERT_LAYERS: summary.experts.layers,
                layout_formulas.EXPERT_ELEMENTS: summary.experts.weights.elements,
                layout_formulas.EXPERT_BYTES: kept.element_bytes,
                layout_formulas.DISPATCH_ROW: summary.hidden * (1 if narrow else width),
            }
        return found

    def layout_values(self, layout: Layout) -> dict[Symbol, float]:
        """The numbers of the symbols of the layout and of the model."""
        return {
            **self._model_values,
            layout_formulas.TENSOR_PARALLEL: layout.tensor_parallel_size,
            layout_formulas.EXPERT_DEVICES: self.expert_devices(layout),
            layout_formulas.DEVICES_PER_NODE: self.devices_per_node,
        }

    @cached_property
    def _model_values(self) -> dict[Symbol, float]:
        return self.model_values()

    def expert_devices(self, layout: Layout) -> int:
        """Devices that share one set of routed experts, within a pipeline stage."""
        ranks = layout.data_parallel_size if layout.expert_parallel else 1
        return layout.tensor_parallel_size * ranks

    # memory ---------------------------------------------------------------------------------------

    @property
    def usable_bytes(self) -> float:
        return self.usable_share * self.hardware.memory.value

    def weight_parts(self, layout: Layout) -> dict[str, float]:
        """Bytes of weights on one device, by component and what no component has."""
        cut, stages = layout.tensor_parallel_size, layout.pipeline_parallel_size
        found = {
            name: (shape.weight_bytes - shape.bytes_saved(layout.sizes.get(name, 1))) / cut
            for name, shape in self.shapes.items()
        }
        summary = self.summary
        found["experts"] = 0.0
        found["other weights"] = (
            self._bytes(summary.linears) / cut
            + self._bytes(summary.replicated)
            + summary.vectors * itemsize(summary.dtype)
        )
        if summary.experts is not None:
            found["experts"] += self._bytes(summary.experts.weights) / self.expert_devices(layout)
        if self.load.draft and summary.draft is not None:
            found["experts"] += self._bytes(summary.draft.experts) / self.expert_devices(layout)
            found["other weights"] += self._bytes(summary.draft.linears) / cut
        return {name: count / stages for name, count in found.items()}

    def _bytes(self, weights: Weights) -> float:
        return weights.elements * self.precision(weights).element_bytes

    def weight_bytes(self, layout: Layout) -> float:
        return sum(self.weight_parts(layout).values())

    def sequence_bytes(self, layout: Layout) -> float:
        """Bytes of KV cache that one device keeps of one sequence at its end."""
        context, cut = self.load.context, layout.tensor_parallel_size
        kept = sum(kind.cache_bytes(context, self.cache_bytes, cut) for kind in self.kinds)
        return kept / layout.pipeline_parallel_size

    def cache_bytes_of(self, layout: Layout, sequences: int) -> float:
        """Bytes of KV cache on the fullest device with `sequences` in flight."""
        return -(-sequences // layout.data_parallel_size) * self.sequence_bytes(layout)

    def max_sequences(self, layout: Layout) -> int:
        """Sequences that fit beside the weights, on all devices together."""
        room = self.usable_bytes - self.weight_bytes(layout)
        each = self.sequence_bytes(layout)
        if room < 0:
            return 0
        mine = int(room // each) if each else 2**20
        return mine * layout.data_parallel_size

    def fits(self, layout: Layout, sequences: int) -> bool:
        needed = self.weight_bytes(layout) + self.cache_bytes_of(layout, sequences)
        return needed <= self.usable_bytes

    def most_within(self, layout: Layout, tpot_seconds: float) -> int:
        """The most sequences, of those that fit, whose step takes no longer; 0 if none do."""
        ranks = layout.data_parallel_size
        fit, too_many = 0, self.max_sequences(layout) // ranks + 1
        while too_many - fit > 1:
            middle = (fit + too_many) // 2
            if self.step_seconds(layout, middle * ranks) <= tpot_seconds:
                fit = middle
            else:
                too_many = middle
        return fit * ranks

    def throughput(self, layout: Layout, sequences: int) -> float:
        """Output tokens per second and device with `sequences` in flight."""
        if not sequences:
            return 0.0
        return sequences / self.step_seconds(layout, sequences) / layout.devices

"""Everything that `fgtp plan` says, as data: the tables, the JSON and the page read it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fgtp_pass.cost import commands
from fgtp_pass.cost.advice import Choice, Objective, choose_sizes
from fgtp_pass.cost.compare import Comparison, Option, compare, freed, smallest_replica
from fgtp_pass.cost.estimate import Cluster, Row, estimate
from fgtp_pass.cost.hardware import Hardware
from fgtp_pass.cost.layout import Deployment, Layout, Load
from fgtp_pass.cost.model_summary import ModelSummary
from fgtp_pass.cost.shape import ComponentShape
from fgtp_pass.cost.uncertainty import Predicted
from fgtp_pass.plan.sizes import ComponentSizes


@dataclass(frozen=True)
class Report:
    """One model on given devices.

    sizes: in force in `rows`, for data-parallel ranks of one device each. choice: what the
    objective would take there. prefill: what it would take for instances that only prefill.
    """

    deployment: Deployment
    devices: int
    objective: Objective
    comparison: Comparison
    sizes: Mapping[str, int]
    rows: list[Row]
    choice: Choice
    prefill: Choice
    asked: Mapping[str, int] | None

    @property
    def summary(self) -> ModelSummary:
        return self.deployment.summary

    @property
    def load(self) -> Load:
        return self.deployment.load

    @property
    def hardware(self) -> Hardware:
        return self.deployment.hardware

    @property
    def shapes(self) -> Mapping[str, ComponentShape]:
        return self.deployment.shapes

    @property
    def cluster(self) -> Cluster:
        return self.deployment.cluster(self.data_parallel)

    @property
    def data_parallel(self) -> Layout:
        """One data-parallel rank per device, without sizes."""
        return Layout(1, self.devices, expert_parallel=self.summary.experts is not None)

    @property
    def fine_grained(self) -> Layout:
        """The same with the sizes in force."""
        layout = self.data_parallel
        return Layout(1, layout.data_parallel_size, 1, layout.expert_parallel, self.sizes)

    @property
    def tokens_per_rank(self) -> int:
        return -(-self.load.sequences // self.devices)

    @property
    def command(self) -> commands.Command:
        """What serves the best layout, or where sizes were asked for, the layout with these."""
        best = self.comparison.best
        if self.asked is not None:
            return commands.serve_command(self.deployment, self.fine_grained, self.load.sequences)
        if not best.fits:
            return commands.Command("", "", ("No command: no layout fits.",))
        return commands.serve_command(self.deployment, best.layout, best.sequences)

    @property
    def other_systems(self) -> list[commands.Command]:
        """The fine-grained layout in other systems' words, or why they have none."""
        fine = self.comparison.best_fine_grained
        layout = self.fine_grained if self.asked is not None or fine is None else fine.layout
        sequences = self.load.sequences
        return [
            system(self.deployment, layout, sequences)
            for system in (commands.sglang, commands.mindie)
        ]

    # JSON -----------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """inputs, layouts, components, totals and recommended, of plain values."""
        hidden = ("component", "group_size")
        components = {
            row.component: {k: v for k, v in asdict(row).items() if k not in hidden}
            for row in self.rows
        }
        return {
            "inputs": self.inputs,
            "layouts": [self.layout_json(one) for one in self.comparison.options],
            "components": components,
            "totals": self.totals,
            "recommended": self.recommended,
        }

    @property
    def inputs(self) -> dict[str, Any]:
        load, target = self.load, self.comparison.target
        return {
            "model": self.summary.name,
            "architecture": self.summary.architecture,
            "hardware": self.hardware.name,
            "devices": self.devices,
            "devices_per_node": self.deployment.devices_per_node,
            "network": self.hardware.across_nodes.kind,
            "sequences": load.sequences,
            "input_tokens": load.input_tokens,
            "output_tokens": load.output_tokens,
            "weights": load.scheme.name if load.scheme else self.summary.dtype,
            "kv_dtype": load.cache_dtype or self.summary.dtype,
            "mtp": load.draft,
            "objective": self.objective,
            "tpot_target_ms": None if target is None else 1e3 * target,
        }

    def layout_json(self, option: Option) -> dict[str, Any]:
        context = max(1, self.load.context)
        command = commands.serve_command(self.deployment, option.layout, option.sequences)
        return {
            "name": option.name,
            "fits": option.fits,
            "tpot_ms": milliseconds(option.tpot),
            "prefill_ms": round(1e3 * option.prefill, 2),
            "tokens_per_second_per_device": round(option.throughput, 2),
            "weight_bytes": round(sum(option.weights.values())),
            "kv_bytes_per_token": round(option.cache_bytes / context, 2),
            "max_sequences": option.most,
            "command": command.text if option.fits else "",
            "sequences": option.sequences,
            "meets_target": option.meets_target,
            "tokens_per_second_per_device_at_max": round(option.throughput_at_most, 2),
            "sizes": {name: size for name, size in option.layout.sizes.items() if size > 1},
            "parts_ms": {name: round(1e3 * s, 3) for name, s in option.parts.items() if s},
            "weights_by_part": {name: round(count) for name, count in option.weights.items()},
            "freed": freed(self.deployment, option),
        }

    @property
    def totals(self) -> dict[str, Any]:
        """Sums over the rows. A tied weight counts once."""
        deployment, sequences = self.deployment, self.load.sequences
        whole, sharded = self.data_parallel, self.fine_grained
        low, high = (sum(row.tpot_change_range_ms[side] for row in self.rows) for side in (0, 1))
        return {
            "group_sizes": dict(self.sizes),
            "weight_bytes": sum(row.weight_bytes for row in self.rows),
            "bytes_saved_per_rank": sum(row.bytes_saved_per_rank for row in self.rows),
            "bytes_moved_per_step": sum(row.bytes_moved_per_step for row in self.rows),
            "messages_per_step": sum(row.messages_per_step for row in self.rows),
            "tpot_change_ms": round(sum(row.tpot_change_ms for row in self.rows), 4),
            "tpot_change_range_ms": (round(low, 4), round(high, 4)),
            "memory_per_rank": {
                "weight_bytes_whole": round(deployment.weight_bytes(whole)),
                "weight_bytes": round(deployment.weight_bytes(sharded)),
                "kv_bytes": round(deployment.cache_bytes_of(sharded, sequences)),
                "usable_bytes": round(deployment.usable_bytes),
                "fits_whole": deployment.fits(whole, sequences),
                "fits": deployment.fits(sharded, sequences),
            },
        }

    @property
    def recommended(self) -> dict[str, Any]:
        """The layout, the sizes for the objective with reasons, and what goes with them."""
        best, replica = self.comparison.best, smallest_replica(self.deployment)
        # what does not fit is not recommended
        sizes = self.choice.sizes if self.choice.enough else dict.fromkeys(self.choice.sizes, 1)
        return {
            "objective": self.objective,
            "layout": best.name if best.fits else None,
            "verdict": self.comparison.verdict,
            "smallest_replica": {
                "tensor_parallel_size": replica.tensor_parallel_size,
                "pipeline_parallel_size": replica.pipeline_parallel_size,
            },
            "sizes": dict(sizes),
            "reasons": dict(self.choice.reasons),
            "prefill_sizes": dict(self.prefill.sizes),
            "prefill_reasons": dict(self.prefill.reasons),
            "command": asdict(self.command),
            "other_systems": [asdict(one) for one in self.other_systems],
        }


def milliseconds(predicted: Predicted) -> list[float]:
    """[low, mid, high], rounded."""
    return [round(1e3 * one, 3) for one in (predicted.low, predicted.mid, predicted.high)]


def make_report(
    deployment: Deployment,
    devices: int,
    *,
    objective: Objective = "balanced",
    target: float | None = None,
    asked: ComponentSizes | None = None,
) -> Report:
    """Compare the layouts of a model.

    target: seconds per output token, or None for the given load. asked: sizes for data-parallel
    ranks of one device, where "auto" (and None everywhere) is the objective's. Raises ConfigError
    for sizes that do not divide the devices.
    """
    shapes = deployment.shapes
    whole = Layout(1, devices, expert_parallel=deployment.summary.experts is not None)
    cluster = deployment.cluster(whole)
    tokens = -(-deployment.load.sequences // devices)
    needed = deployment.weight_bytes(whole) - deployment.usable_bytes
    needed += deployment.cache_bytes_of(whole, deployment.load.sequences)
    choice = choose_sizes(shapes, cluster, tokens, objective, max(0.0, needed))
    sizes = {name: choice.sizes.get(name, 1) for name in shapes}
    if asked is not None:
        resolved = asked.resolve(devices, deployment.devices_per_node, choice.sizes)
        sizes = {name: resolved.get(name, 1) for name in shapes}
    given = sizes if asked is not None else None
    return Report(
        deployment=deployment,
        devices=devices,
        objective=objective,
        comparison=compare(deployment, devices, objective, target, given),
        sizes=sizes,
        rows=estimate(shapes, cluster, sizes, tokens),
        choice=choice,
        prefill=choose_sizes(shapes, cluster, deployment.load.input_tokens, objective),
        asked=given,
    )

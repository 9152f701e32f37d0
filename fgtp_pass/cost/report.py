"""Everything that `fgtp plan` says, as data: the table, the JSON and the page read it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fgtp_pass.cost import spelling
from fgtp_pass.cost.advice import Choice, Objective, choose_sizes
from fgtp_pass.cost.estimate import Cluster, Row, estimate
from fgtp_pass.cost.hardware import Hardware
from fgtp_pass.cost.memory import (
    LatentCache,
    Load,
    Memory,
    TensorParallel,
    latent_cache,
    rank_memory,
    tensor_parallel,
)
from fgtp_pass.cost.shape import ComponentShape, component_shapes
from fgtp_pass.sizes import AUTO, ComponentSizes
from fgtp_pass.summary import ModelSummary


@dataclass(frozen=True)
class Report:
    """One model on one cluster.

    shapes: the model's components. sizes: in force in `rows`. whole, sharded: memory of one rank
    without and with these sizes. choice: what the objective would take. tensor_parallel: the
    smallest replica that holds the model whole. latent: KV bytes of a latent cache, or None.
    """

    summary: ModelSummary
    cluster: Cluster
    load: Load
    objective: Objective
    shapes: Mapping[str, ComponentShape]
    sizes: Mapping[str, int]
    rows: list[Row]
    whole: Memory
    sharded: Memory
    choice: Choice
    tensor_parallel: TensorParallel
    latent: LatentCache | None

    @property
    def command(self) -> str:
        """The vLLM command line that puts the sizes into force."""
        return spelling.vllm_command(
            self.summary.name,
            self.cluster.data_parallel_size,
            self.sizes,
            self.summary.keys,
            expert_parallel=self.summary.experts > 0,
        )

    @property
    def totals(self) -> dict[str, Any]:
        """Sums over the rows. A tied weight counts once."""
        return {
            "group_sizes": dict(self.sizes),
            "weight_bytes": sum(row.weight_bytes for row in self.rows),
            "bytes_saved_per_rank": sum(row.bytes_saved_per_rank for row in self.rows),
            "bytes_moved_per_step": sum(row.bytes_moved_per_step for row in self.rows),
            "messages_per_step": sum(row.messages_per_step for row in self.rows),
            "tpot_change_ms": round(sum(row.tpot_change_ms for row in self.rows), 4),
            "memory_per_rank": {
                "weight_bytes_whole": round(self.whole.weight_bytes),
                "weight_bytes": round(self.sharded.weight_bytes),
                "kv_bytes": round(self.sharded.kv_bytes),
                "usable_bytes": round(self.sharded.usable_bytes),
                "fits_whole": self.whole.fits,
                "fits": self.sharded.fits,
            },
        }

    @property
    def recommended(self) -> dict[str, Any]:
        """The sizes for the objective with reasons, and what goes with them."""
        found: dict[str, Any] = {
            "objective": self.objective,
            "sizes": dict(self.choice.sizes),
            "reasons": dict(self.choice.reasons),
            "tensor_parallel": asdict(self.tensor_parallel),
            "vllm": self.command,
            "mindie": spelling.mindie(self.sizes),
            "sglang": spelling.sglang(self.sizes, has_experts=self.summary.experts > 0),
        }
        if self.latent is not None:
            found["attention"] = {"parallelism": "data", **asdict(self.latent)}
        return found

    def to_json(self) -> dict[str, Any]:
        """components, totals and recommended, of plain values."""
        hidden = ("component", "group_size")
        components = {
            row.component: {k: v for k, v in asdict(row).items() if k not in hidden}
            for row in self.rows
        }
        return {"components": components, "totals": self.totals, "recommended": self.recommended}


def make_report(
    summary: ModelSummary,
    hardware: Hardware,
    load: Load,
    *,
    data_parallel_size: int,
    ranks_per_node: int,
    objective: Objective = "balanced",
    asked: ComponentSizes | None = None,
) -> Report:
    """Price a model. asked: the sizes, where "auto" (and None everywhere) is the objective's.

    Raises ConfigError for sizes that do not divide the data-parallel size.
    """
    shapes = component_shapes(summary.plan, summary.dtype, load.quantization)
    cluster = Cluster(hardware, data_parallel_size, ranks_per_node)
    choice = choose_sizes(shapes, cluster, load.batch, objective)
    asked = asked or ComponentSizes(dict.fromkeys(shapes, AUTO))
    resolved = asked.resolve(data_parallel_size, ranks_per_node, choice.sizes)
    sizes = {name: resolved.get(name, 1) for name in shapes}
    return Report(
        summary=summary,
        cluster=cluster,
        load=load,
        objective=objective,
        shapes=shapes,
        sizes=sizes,
        rows=estimate(shapes, cluster, sizes, load.batch),
        whole=rank_memory(summary, load, hardware, data_parallel_size, {}),
        sharded=rank_memory(summary, load, hardware, data_parallel_size, sizes),
        choice=choice,
        tensor_parallel=tensor_parallel(summary, load, hardware, ranks_per_node),
        latent=latent_cache(summary, load, data_parallel_size),
    )

"""What fits: memory of one device, and the smallest global tensor parallelism that has room."""

from collections.abc import Mapping
from dataclasses import dataclass

from fgtp_pass.cost.hardware import Hardware
from fgtp_pass.cost.shape import ComponentShape, component_shapes, precision
from fgtp_pass.plan import format_bytes, itemsize
from fgtp_pass.summary import ModelSummary

# vLLM's default gpu_memory_utilization; the rest is for activations, graphs and the runtime.
USABLE = 0.9
_PCIE_LIMIT = 2


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, and what is usable of it."""

    weight_bytes: float
    kv_bytes: float
    usable_bytes: float

    @property
    def fits(self) -> bool:
        return self.weight_bytes + self.kv_bytes <= self.usable_bytes


@dataclass(frozen=True)
class Load:
    """What one data-parallel rank serves: sequences at once, tokens of each, weights' scheme."""

    batch: int
    context: int
    quantization: str | None = None


def weights_by_part(
    summary: ModelSummary, shapes: Mapping[str, ComponentShape], load: Load
) -> dict[str, float]:
    """Bytes of the whole model: its components, its routed experts, and everything else."""
    linear = precision(summary.dtype, load.quantization).element_bytes
    vectors = summary.others - summary.linears
    return {
        **{name: shape.weight_bytes for name, shape in shapes.items()},
        "experts": summary.experts * linear,
        "others": summary.linears * linear + vectors * itemsize(summary.dtype),
    }


def rank_memory(
    summary: ModelSummary,
    load: Load,
    hardware: Hardware,
    data_parallel_size: int,
    sizes: Mapping[str, int],
) -> Memory:
    """Memory of a data-parallel rank of one device; routed experts lie over all ranks."""
    shapes = component_shapes(summary.plan, summary.dtype, load.quantization)
    parts = weights_by_part(summary, shapes, load)
    saved = sum(shape.bytes_saved(sizes.get(name, 1)) for name, shape in shapes.items())
    experts_elsewhere = parts["experts"] * (1 - 1 / data_parallel_size)
    return Memory(
        weight_bytes=sum(parts.values()) - saved - experts_elsewhere,
        kv_bytes=load.batch * load.context * summary.kv_bytes_per_token(),
        usable_bytes=USABLE * hardware.memory.value,
    )


# global tensor parallelism ----------------------------------------------------------------------


@dataclass(frozen=True)
class TensorParallel:
    """The smallest number of devices that hold one replica of the model, and how they split it.

    pipeline_parallel_size: > 1 where heads or links allow no larger tensor_parallel_size.
    """

    tensor_parallel_size: int
    pipeline_parallel_size: int
    reason: str


def tensor_parallel(
    summary: ModelSummary, load: Load, hardware: Hardware, devices_per_node: int = 8
) -> TensorParallel:
    """The smallest global tensor parallelism that has room for weights and KV cache.

    Weights are cut by all devices of a replica, the KV cache by heads (a latent cache is not cut).
    The size divides attention and KV heads, for a latent cache the attention heads alone, and stays
    within a node; over PCIe it stays at 2, since an all_reduce per half layer outweighs what larger
    ones save. What that leaves over goes to pipeline stages.
    """
    shapes = component_shapes(summary.plan, summary.dtype, load.quantization)
    weights = sum(weights_by_part(summary, shapes, load).values())
    usable = USABLE * hardware.memory.value
    tokens = load.batch * load.context
    limit = min(devices_per_node, _PCIE_LIMIT if hardware.within_node.kind == "pcie" else 1024)
    allowed = [k for k in _powers_of_two(limit) if _cuts_heads(summary, k)]
    needed = 0.0
    for size in allowed:
        needed = weights / size + tokens * summary.kv_bytes_per_token(size)
        if needed <= usable:
            text = (
                f"the smallest that holds {format_bytes(needed)} of weights and KV cache per "
                f"device in {format_bytes(usable)}"
            )
            return TensorParallel(size, 1, text)
    largest = allowed[-1]
    stages = -(-int(needed) // int(usable))
    why = "over PCIe more loses time" if limit == _PCIE_LIMIT else "heads and the node end there"
    return TensorParallel(
        largest,
        stages,
        f"{format_bytes(needed)} per device at {largest}, {format_bytes(usable)} usable; {why}, so "
        f"{stages} pipeline stages",
    )


def _powers_of_two(limit: int) -> list[int]:
    return [2**i for i in range(limit.bit_length()) if 2**i <= limit]


def _cuts_heads(summary: ModelSummary, size: int) -> bool:
    kv = summary.latent or summary.kv_heads % size == 0
    return summary.attention_heads % size == 0 and kv


@dataclass(frozen=True)
class LatentCache:
    """KV bytes per device of a latent cache, by how attention is spread over the same devices."""

    tensor_parallel_bytes: float
    data_parallel_bytes: float


def latent_cache(summary: ModelSummary, load: Load, devices: int) -> LatentCache | None:
    """The KV cache of `devices` ranks' sequences under both; None for a model with KV heads.

    Attention cut by heads keeps the latents of all sequences on every device, since each head
    reads all of a latent; data-parallel attention keeps each sequence's once.
    """
    if not summary.latent:
        return None
    own = load.batch * load.context * summary.kv_bytes_per_token()
    return LatentCache(own * devices, own)

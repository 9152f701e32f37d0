"""The core's patterns, within what vLLM's layers can be cut into."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import fx, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import MLAAttention
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.models.interfaces import supports_multimodal

from fgtp_pass.algebra.placement import Cut
from fgtp_pass.detect.match import Findings, Match, MatmulStage, Pattern, Refusal
from fgtp_pass.graph.dataflow import GraphView
from fgtp_pass.patterns import BUILTIN
from fgtp_pass.vllm.settings import SEQUENCE_PARALLEL

WhyWhole = Callable[[str], str]  # a weight's name -> why vLLM cannot cut it, or nothing


def patterns_for(
    config: VllmConfig,
    model: nn.Module,
    cuttable: set[int],
    sizes: Mapping[str, int],
    whole: dict[str, str],
) -> tuple[Pattern, ...]:
    """Those to plan `model` with. config: of the real model, which may be quantised.

    cuttable: the ids of the layers whose classes we have. sizes: by component, as far as known.
    whole: gets a weight that vLLM cannot cut, with the reason, by component.
    """

    ranks = config.parallel_config.tensor_parallel_size

    def projection(fqn: str) -> str:
        layer = model.get_submodule(fqn.rpartition(".")[0])
        if id(layer) not in cuttable:
            return f"vLLM holds it in a {type(layer).__name__}, which cannot be cut"
        heads = getattr(layer, "total_num_kv_heads", ranks)
        if heads < ranks:
            return (
                f"it has {heads} heads of k and v for {ranks} tensor-parallel ranks, so some hold "
                "the same ones, which cannot be cut yet"
            )
        return _cuts_blocks(config.quant_config, layer, max(sizes["qkv"], 2))

    def shared_expert(fqn: str) -> str:
        return SEQUENCE_PARALLEL if config.parallel_config.use_sequence_parallel_moe else ""

    limits = {"qkv": projection, "sharedexpert": shared_expert}
    return tuple(
        _within(p, limits[p.component], whole) if p.component in limits else _rows_cut(p)
        for p in BUILTIN
    )


def absorbed(model: nn.Module) -> dict[str, str]:
    """Weights that are no part of the graph, with the reason."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: "vLLM's attention takes it apart when it is loaded, for keys and for "
        "values"
        for layer in model.modules()
        if isinstance(layer, MLAAttention)
        for parameter in layer.kv_b_proj.parameters()
    }


def of_encoders(model: Any) -> dict[str, str]:
    """Weights with which a multimodal model reads images, sounds and the like, with the reason."""
    if not supports_multimodal(model):
        return {}
    own = {id(parameter) for parameter in model.get_language_model().parameters()}
    return {
        name: "it is outside the language model, in an encoder, which does not run in every step, "
        "and at counts of its own"
        for name, parameter in model.named_parameters()
        if id(parameter) not in own
    }


def _cuts_blocks(quantization: Any, layer: Any, size: int) -> str:
    """Why the outputs of a layer that is quantised in blocks cannot be cut in `size`."""
    block = getattr(quantization, "weight_block_size", None)
    parts = layer.output_partition_sizes
    if not block or all(part % (size * block[0]) == 0 for part in parts):
        return ""
    if isinstance(quantization.get_quant_method(layer, layer.prefix), UnquantizedLinearMethod):
        return ""
    return (
        f"it is quantised in blocks of {block[0]} outputs, and {size} shards of its parts {parts} "
        "would end within blocks"
    )


def _rows_cut(pattern: Pattern) -> Pattern:
    """o_proj with its inputs cut only: vLLM holds it in a RowParallelLinear."""
    if pattern.component != "oproj":
        return pattern

    def find(view: GraphView, found: Findings) -> Iterator[Match | Refusal]:
        for result in pattern.find(view, found):
            if isinstance(result, Match):
                stages = tuple(
                    replace(stage, cuts=(Cut.IN,)) if isinstance(stage, MatmulStage) else stage
                    for stage in result.stages
                )
                result = replace(result, stages=stages)
            yield result

    return replace(pattern, find=find)


def _within(pattern: Pattern, why_whole: WhyWhole, whole: dict[str, str]) -> Pattern:
    """The pattern without the weights that vLLM cannot cut, and the sites that need them all."""

    def find(view: GraphView, found: Findings) -> Iterator[Match | Refusal]:
        for result in pattern.find(view, found):
            if isinstance(result, Refusal):
                yield result
                continue
            refused = set()
            for weight in result.weights:
                reason = why_whole(view.parameters[weight])
                if reason:
                    refused.add(weight)
                    whole.setdefault(pattern.component, f"{view.parameters[weight]}: {reason}")
                    yield Refusal(weight, reason)
            first, *more = result.stages
            if not refused:
                yield result
            elif not more and isinstance(first, MatmulStage):
                yield from _side_by_side(result, first, refused)

    return replace(pattern, find=find)


def _side_by_side(match: Match, stage: MatmulStage, without: set[fx.Node]) -> Iterator[Match]:
    """The match of what is left of matmuls that are each cut by themselves."""
    kept = [
        (matmul, blocks)
        for matmul, blocks in zip(stage.matmuls, stage.blocks, strict=True)
        if matmul.weight is not None and matmul.weight.placeholder not in without
    ]
    if kept:
        matmuls, blocks = zip(*kept, strict=True)
        stage = replace(stage, matmuls=matmuls, blocks=blocks)
        yield replace(match, stages=(stage,), outputs=tuple(matmul.node for matmul in matmuls))

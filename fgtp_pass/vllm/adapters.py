"""LoRA beside sharded layers: base(x) + B(A(x)), where the base is cut and the pair A, B is whole.

Each rank adds what its own adapters make of its own tokens to the base's results for these, so
ranks need not have the same adapters, and nothing of them is sent. vLLM wraps the layers of a
loaded model in classes of its own, which go by a layer's type and sizes and call its kernel. They
are shown a sharded layer as the whole one that it stands for, and its output in place of a kernel.
"""

import functools
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from vllm.lora import model_manager
from vllm.lora.layers import LogitsProcessorWithLoRA
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.linear import LinearBase, QKVParallelLinear, RowParallelLinear
from vllm.platforms import current_platform

from fgtp_pass.errors import ConfigError
from fgtp_pass.vllm.born_sharded import LAYER_CLASSES, column_output, row_output
from fgtp_pass.vllm.marker_ops import LAYERS
from fgtp_pass.vllm.projections import PROJECTION_CLASSES

log = logging.getLogger("vllm.fgtp_pass")


@contextmanager
def over_shards() -> Iterator[None]:
    """While vLLM loads a model and wraps its layers for adapters: sharded ones come along."""
    apart: set[str] = set()
    around: dict[str, Any] = {
        "from_layer": functools.partial(_wrap_layer, apart),
        "from_layer_logits_processor": _wrap_logits,
        "get_punica_wrapper": _kernels,
    }
    with ExitStack() as stack:
        for name, function in around.items():
            stock = getattr(model_manager, name)
            replaced: Any = functools.update_wrapper(functools.partial(function, stock), stock)
            stack.enter_context(mock.patch.object(model_manager, name, replaced))
        yield
    if apart:
        log.warning(
            "fgtp: adapters may add to inner features of %d FFNs, so each projection of these "
            "moves whole activations, which is right but slower; lora_target_modules can leave "
            "them out",
            len(apart),
        )


@contextmanager
def without_adapters(runner: Any) -> Iterator[None]:
    """While an idle rank runs a dummy batch. Stock vLLM loads dummy adapters for it, and unloads
    all there are at its end: those that were loaded before they are asked for, too.
    """

    def select(
        lora_config: Any,
        num_scheduled_tokens: Any,
        num_sampled_tokens: Any = None,
        *_: Any,
        **__: Any,
    ) -> Any:
        return runner.maybe_select_dummy_loras(
            lora_config, num_scheduled_tokens, num_sampled_tokens=num_sampled_tokens
        )

    with mock.patch.object(runner, "maybe_dummy_run_with_lora", select):
        yield


def _wrap_layer(apart: set[str], stock: Any, layer: Any, *args: Any, **kwargs: Any) -> Any:
    """What `from_layer` does: the layer for adapters, or the layer itself where vLLM has none."""
    with mock.patch.dict(op_registry_oot):
        for name in (*LAYER_CLASSES, *PROJECTION_CLASSES):
            op_registry_oot.pop(name, None)  # layers that were built whole are of vLLM's classes
        if not hasattr(layer, "fgtp") or not isinstance(layer, LinearBase):
            return stock(layer, *args, **kwargs)
        with _as_whole(layer):
            wrapped = stock(layer, *args, **kwargs)
    if wrapped is not layer:
        wrapper: Any = type(wrapped)
        wrapped.__class__ = _over_shard(wrapper)
        _run_apart(layer.fgtp, apart)
    return wrapped


@contextmanager
def _as_whole(layer: Any) -> Iterator[None]:
    """The class and the sizes of the layer that this tensor-parallel rank would hold."""
    k, (outputs, inputs), sharded = layer.fgtp.group.size, layer.fgtp.weight.shape, type(layer)
    sizes = {"tp_size": layer.tp_size // k, "tp_rank": layer.tp_rank // k}
    if isinstance(layer, RowParallelLinear):
        sizes["input_size_per_partition"] = inputs
    else:
        sizes["output_size_per_partition"] = outputs
    if isinstance(layer, QKVParallelLinear):  # built with k times the heads, 1/k as wide
        sizes |= {name: getattr(layer, name) * k for name in ("head_size", "v_head_size")}
        heads = ("total_num_heads", "total_num_kv_heads")
        sizes |= {name: getattr(layer, name) // k for name in heads}
    with ExitStack() as stack:
        for name, value in sizes.items():
            stack.enter_context(mock.patch.object(layer, name, value))
        layer.__class__ = sharded.__base__
        try:
            yield
        finally:
            layer.__class__ = sharded


class _Output:
    """In the place of a sharded layer's kernel: its whole output for this rank's own tokens."""

    @staticmethod
    def apply(layer: Any, x: torch.Tensor, _bias: torch.Tensor | None = None) -> torch.Tensor:
        """_bias: the layer's own, which is in its output."""
        if isinstance(layer, RowParallelLinear):
            return row_output(layer, x)
        return column_output(layer, x)


@functools.cache
def _over_shard(wrapper: Any) -> Any:
    """vLLM's wrapper of linear layers, over a sharded one."""

    def _get_quant_method(self: Any) -> type[_Output]:
        return _Output

    return type(f"Sharded{wrapper.__name__}", (wrapper,), {"_get_quant_method": _get_quant_method})


def _run_apart(sharded: Any, apart: set[str]) -> None:
    """Let each projection of this one's FFN move whole activations: an adapter is of its own rank's
    tokens, and has all features of these.
    """
    stretch = sharded.stretch
    if stretch is None:
        return
    if sharded.group.rank == 0:  # who speaks for the group
        apart.add(sharded.weight.fqn)
    for other in LAYERS.values():
        if other.stretch is stretch:
            other.stretch = None


class _ShardedLogitsWithLoRA(LogitsProcessorWithLoRA):  # type: ignore[misc]
    """Logits of a sharded lm_head, which are exchanged before an adapter adds to them."""

    def _get_logits(
        self,
        hidden_states: torch.Tensor,
        lm_head: Any,
        embedding_bias: torch.Tensor | None = None,
        skip_gather: bool = False,
    ) -> torch.Tensor | None:
        if skip_gather:  # of batch-sharded sampling, which is refused before: `check_engine`
            raise ConfigError(
                "logits of a tensor-parallel rank alone (skip_gather) are not supported beside "
                "LoRA: adapters add to whole logits."
            )
        logits: torch.Tensor | None = self.base_layer._get_logits(
            hidden_states, lm_head, embedding_bias
        )
        if logits is None or not logits.shape[0]:  # of another rank's rows alone
            return logits
        logits = logits.contiguous()
        added: torch.Tensor | None = self.punica_wrapper.add_lora_logits(
            logits, hidden_states, self.lora_a_stacked, self.lora_b_stacked, 1.0
        )
        return logits if current_platform.can_update_inplace() else added


def _wrap_logits(
    stock: Any,
    layer: Any,
    lm_head: Any,
    max_loras: int,
    lora_config: Any,
    model_config: Any = None,
) -> Any:
    if not hasattr(lm_head, "fgtp_exchange"):
        return stock(layer, lm_head, max_loras, lora_config, model_config)
    weight = lm_head.weight
    wrapped = _ShardedLogitsWithLoRA(
        layer, lm_head.embedding_dim, weight.dtype, weight.device, None
    )
    wrapped.create_lora_weights(max_loras, lora_config, model_config)
    return wrapped


class _OwnRows(PunicaWrapperCPU):  # type: ignore[misc]
    """vLLM's CPU kernels want an adapter for each row, and rows that pad a step to the token count
    of other ranks have none.
    """

    def add_lora_linear(self, y: Any, x: Any, *args: Any, **kwargs: Any) -> None:
        own = self.indices_len[0]
        super().add_lora_linear(y[:own], x[:own], *args, **kwargs)

    def add_lora_embedding(self, y: Any, x: Any, *args: Any, **kwargs: Any) -> None:
        own = self.indices_len[0]
        super().add_lora_embedding(y[:own], x[:own], *args, **kwargs)


def _kernels(stock: Any, *args: Any, **kwargs: Any) -> Any:
    kernels = stock(*args, **kwargs)
    if type(kernels) is PunicaWrapperCPU:
        kernels.__class__ = _OwnRows
        kernels._embeddings_indices.zero_()  # which rows of padding look up with
    return kernels

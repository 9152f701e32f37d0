"""Loaded in every vLLM process of a test: stacks on SIGUSR1, and the bytes of the weights."""

import faulthandler
import functools
import os
import signal
import sys
from typing import Any


def install() -> None:
    """vLLM may call it more than once in a process."""
    if str(os.getpid()) != os.environ["FGTP_TEST_PID"]:  # that one has its own
        faulthandler.register(signal.SIGUSR1, file=sys.stderr, all_threads=True)
    _count_weights()


def _count_weights() -> None:
    """Let a loaded model say the bytes of its weights before CPU kernels pack them."""
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    stock = DefaultModelLoader.load_weights
    if hasattr(stock, "fgtp_test"):
        return

    @functools.wraps(stock)
    def load_weights(self: Any, model: Any, model_config: Any) -> None:
        stock(self, model, model_config)
        model.weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters())

    load_weights.fgtp_test = True  # type: ignore[attr-defined]
    DefaultModelLoader.load_weights = load_weights

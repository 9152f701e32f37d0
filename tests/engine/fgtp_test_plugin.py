"""Loaded in every vLLM process of a test: stacks on SIGUSR1, the bytes of the weights; where
FGTP_TEST_PIECEWISE is set, the compilation mode that vLLM uses on GPUs; where FGTP_TEST_PLAIN is,
plain weights, as there; where FGTP_TEST_OPAQUE is, experts in one op and shared ones beside it, as
there; where FGTP_TEST_ADAPTERS is, a graph beside adapters, as there; where FGTP_TEST_MEMORY is,
the memory that loading takes; where FGTP_TEST_IMAGES is, what models that read images need beside
torchvision, which there is not for every torch; where FGTP_TEST_FAULT is, the fault of one rank
that this file asks for.
"""

import faulthandler
import functools
import os
import signal
import sys
import threading
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def install() -> None:
    """vLLM may call it more than once in a process; what it does then has no effect."""
    if str(os.getpid()) != os.environ["FGTP_TEST_PID"]:  # that one has its own
        faulthandler.register(signal.SIGUSR1, file=sys.stderr, all_threads=True)
    _count_weights()
    _force_piecewise()
    if "FGTP_TEST_PLAIN" in os.environ:
        _leave_weights_plain()
    if "FGTP_TEST_OPAQUE" in os.environ:
        _make_experts_opaque()
    if "FGTP_TEST_MEMORY" in os.environ:
        _watch_memory()
    if "FGTP_TEST_IMAGES" in os.environ:
        _do_without_torchvision()
    if "FGTP_TEST_FAULT" in os.environ:
        import faults

        faults.install()
    if "FGTP_TEST_ADAPTERS" in os.environ:
        from vllm.platforms.cpu import CpuPlatform

        CpuPlatform.get_punica_wrapper = classmethod(lambda cls: "adapter_kernels.OpKernels")
    if "FGTP_TEST_PIECEWISE" in os.environ:
        from vllm.compilation.passes.utility.fix_functionalization import FixFunctionalizationPass

        # it names kernels that the CPU build has not; all it does is to save copies
        FixFunctionalizationPass.__call__ = lambda self, graph: None


def _force_piecewise() -> None:
    """Piecewise compilation, caches included, which vLLM turns into another mode on CPUs."""
    from vllm.config import CompilationMode
    from vllm.platforms.cpu import CpuPlatform

    stock = CpuPlatform.check_and_update_config.__func__
    if hasattr(stock, "fgtp_test"):
        return

    def check_and_update_config(cls: Any, config: Any) -> None:
        stock(cls, config)
        asked = "FGTP_TEST_PIECEWISE" in os.environ
        if asked and config.compilation_config.mode == CompilationMode.DYNAMO_TRACE_ONCE:
            config.compilation_config.mode = CompilationMode.VLLM_COMPILE
            config.compilation_config.compile_sizes = []
        if "FGTP_TEST_ADAPTERS" in os.environ:  # on CPUs vLLM has no graph beside these
            config.compilation_config.mode = CompilationMode.DYNAMO_TRACE_ONCE

    check_and_update_config.fgtp_test = True  # type: ignore[attr-defined]
    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)


def _leave_weights_plain() -> None:
    """CPU kernels pack weights, and then only they can read them; other devices do not."""
    import torch.nn.functional as F
    from vllm.model_executor.layers import utils

    def dispatch(layer: Any, remove_weight: bool) -> None:
        layer.cpu_linear = F.linear

    utils.dispatch_cpu_unquantized_gemm = dispatch


def _make_experts_opaque() -> None:
    """On CPUs Dynamo looks into the code of experts; elsewhere they are one op, and shared ones run
    on a stream that CPUs have not.
    """
    import torch
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
    from vllm.model_executor.layers.fused_moe.runner.shared_experts import (
        SharedExperts,
        SharedExpertsOrder,
    )

    def select(self: Any) -> Any:
        ops = torch.ops.vllm
        return ops.moe_forward if self.shared_experts is None else ops.moe_forward_shared

    def order(self: Any, hidden_states: Any) -> SharedExpertsOrder:
        return SharedExpertsOrder.MULTI_STREAM_OVERLAPPED

    MoERunner._select_forward = select
    SharedExperts._determine_shared_experts_order = order


def _do_without_torchvision() -> None:
    """Names for what is imported from it, and not called; and for the part of processors that reads
    videos, which cannot be made without it.
    """
    from transformers.models.auto.video_processing_auto import AutoVideoProcessor
    from transformers.processing_utils import ProcessorMixin, VideosKwargs
    from transformers.utils import is_torchvision_available

    if is_torchvision_available():  # which is kept
        return
    for name in ("", ".transforms", ".transforms.v2", ".transforms.v2.functional"):
        module = sys.modules["torchvision" + name] = ModuleType("torchvision" + name)
        module.__spec__ = ModuleSpec(module.__name__, None)
    sys.modules["torchvision.transforms.v2"].functional = module  # type: ignore[attr-defined]

    stock = ProcessorMixin.check_argument_for_proper_class

    def check(self: Any, name: str, argument: Any) -> Any:
        return None if argument is of_videos else stock(self, name, argument)

    of_videos = type("OfVideos", (dict,), {"valid_kwargs": VideosKwargs})()  # JSON takes a dict
    AutoVideoProcessor.from_pretrained = lambda *args, **kwargs: of_videos
    ProcessorMixin.check_argument_for_proper_class = check


def _count_weights() -> None:
    """Let a loaded model say the bytes of its weights before CPU kernels pack them.

    Without routed experts, which expert parallelism divides.
    """
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    stock = DefaultModelLoader.load_weights
    if hasattr(stock, "fgtp_test"):
        return

    @functools.wraps(stock)
    def load_weights(self: Any, model: Any, model_config: Any) -> None:
        stock(self, model, model_config)
        model.weight_bytes = sum(
            parameter.nbytes
            for name, parameter in model.named_parameters()
            if ".experts." not in name
        )

    load_weights.fgtp_test = True  # type: ignore[attr-defined]
    DefaultModelLoader.load_weights = load_weights


def _watch_memory() -> None:
    """Let a loaded model say by how much memory rose while it was loaded, above the end's."""
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    stock = BaseModelLoader.load_model

    @functools.wraps(stock)
    def load_model(*args: Any, **kwargs: Any) -> Any:
        done, highest = threading.Event(), 0

        def watch() -> None:
            nonlocal highest
            while not done.wait(0.002):
                highest = max(highest, anonymous_memory())

        watcher = threading.Thread(target=watch)
        begun = anonymous_memory()
        watcher.start()
        try:
            model = stock(*args, **kwargs)
        finally:
            done.set()
            watcher.join()
        ended = anonymous_memory()
        model.load_memory = {"taken": ended - begun, "peak": highest - begun}
        return model

    BaseModelLoader.load_model = load_model


def anonymous_memory() -> int:
    """Resident bytes of this process that are no pages of files; checkpoints are mapped files."""
    with open("/proc/self/status") as status:
        (line,) = [line for line in status if line.startswith("RssAnon")]
    return int(line.split()[1]) << 10

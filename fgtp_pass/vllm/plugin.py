"""What vLLM loads in every process, an entry point of `vllm.general_plugins`.

Nothing here acts unless a configuration has `"passes": ["fgtp"]`, or sizes that are lost without.
"""

from typing import Any

from fgtp_pass.vllm import PASS
from fgtp_pass.vllm.early import add_passes, watch_command_lines, wrap


def install() -> None:
    """General plugin: wraps the few functions that must know of the pass. Idempotent."""
    from vllm.config.compilation import CompilationConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    if getattr(EngineArgs.create_engine_config, "_fgtp", False):
        return
    add_passes()  # where vLLM has loaded no platform plugins: VLLM_TARGET_DEVICE=cpu
    watch_command_lines()
    from vllm.config import ParallelConfig
    from vllm.v1.engine.core import DPEngineCoreProc
    from vllm.v1.engine.core_client import EngineCoreClient
    from vllm.v1.executor.abstract import Executor

    from fgtp_pass.vllm import lockstep, waves

    wrap(EngineArgs, "create_model_config", lockstep.create_model_config)
    wrap(EngineArgs, "create_engine_config", _create_engine_config)
    wrap(BaseModelLoader, "create_model", _create_model)
    wrap(CompilationConfig, "init_backend", _init_backend)
    wrap(EngineCoreClient, "make_client", _make_client)
    wrap(DPEngineCoreProc, "_has_global_unfinished_reqs", waves.has_global_unfinished)
    DPEngineCoreProc.fgtp_set_adding = waves.fgtp_set_adding
    wrap(Executor, "__init__", _init_executor)
    for message in ("has_unfinished_dp", "sync_dp_state", "sync_kv_cache_memory_size"):
        wrap(ParallelConfig, message, _between_engines)


def _create_engine_config(stock: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    from fgtp_pass.vllm import settings

    options = settings.read_options(self.compilation_config, self.additional_config)
    if options is None:
        settings.refuse_unused(self.additional_config)
        return stock(self, *args, **kwargs)
    from fgtp_pass.vllm import host, worker

    host.check_host()
    config = stock(self, *args, **kwargs)
    settings.check_engine(config, options)
    ranks = config.parallel_config.data_parallel_size
    options.sizes.resolve(ranks, ranks)  # so that a size that does not fit is told here
    settings.say_what_is_auto(self.additional_config)
    worker.use_sharded_worker(config.parallel_config)
    return config


def _create_model(stock: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    from fgtp_pass.vllm.build_model import build_model

    def positional(
        vllm_config: Any, model_config: Any, prefix: str = ""
    ) -> Any:  # the signature of create_model
        return build_model(stock, self, vllm_config, model_config, prefix)

    return positional(*args, **kwargs)


def _init_backend(stock: Any, self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
    backend = stock(self, vllm_config, *args, **kwargs)
    if PASS not in self.passes:
        return backend
    from fgtp_pass.vllm.graph_pass import with_pass

    most_tokens = vllm_config.scheduler_config.max_num_batched_tokens
    return with_pass(backend, self.inductor_compile_config, most_tokens)


def _make_client(
    stock: Any, multiprocess_mode: bool, asyncio_mode: bool, vllm_config: Any, *args: Any, **kw: Any
) -> Any:
    parallel = vllm_config.parallel_config
    ranks = not asyncio_mode and parallel.data_parallel_size > 1
    if not ranks or PASS not in vllm_config.compilation_config.passes:
        return stock(multiprocess_mode, asyncio_mode, vllm_config, *args, **kw)
    if not multiprocess_mode:
        from fgtp_pass.vllm.waves import run_in_every_step

        client = stock(multiprocess_mode, asyncio_mode, vllm_config, *args, **kw)
        run_in_every_step(client.engine_core)
        return client
    if parallel.data_parallel_rank_local is not None:  # SPMD
        from fgtp_pass.vllm.waves import OneRankClient

        return OneRankClient(vllm_config, *args, **kw)
    from fgtp_pass.vllm.offline import AllRanksClient

    return AllRanksClient(vllm_config, *args, **kw)


def _init_executor(stock: Any, self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
    """Runs in the process of the engine, before it meets the others'."""
    from fgtp_pass.vllm import failure, settings

    options = settings.read_options(vllm_config.compilation_config, vllm_config.additional_config)
    failure.ENGINES.timeout_seconds = options.timeout_seconds if options is not None else None
    stock(self, vllm_config, *args, **kwargs)


def _between_engines(stock: Any, *args: Any, **kwargs: Any) -> Any:
    from fgtp_pass.vllm import failure

    return failure.between_engines(stock, *args, **kwargs)

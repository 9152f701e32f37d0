"""What the user asked of the pass in a vLLM configuration, checked before anything is built."""

import contextlib
import difflib
import importlib.util
import itertools
import json
import logging
import os
from collections.abc import Sequence
from typing import Any

from fgtp_pass.errors import ConfigError
from fgtp_pass.hints import nearest_hint
from fgtp_pass.options.options import Options, parse_options
from fgtp_pass.patterns import BUILTIN
from fgtp_pass.plan.sizes import COMPONENT_SIZES
from fgtp_pass.vllm import PASS, asks

log = logging.getLogger("vllm.fgtp_pass")

OPTIONS = "fgtp_options"
_OPTIONS = ("decode_batch", "objective", "hardware", "allow_missing", "timeout_seconds")
_TIMEOUT_SECONDS = 300.0  # vLLM's own limit for one step (VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS)


def read_options(compilation: Any, additional: Any) -> Options | None:
    """The pass's options in a `CompilationConfig` and an `additional_config`; None without it.

    They are those of the `torch.compile` backend: `finegrained_tp_config`, and under
    `fgtp_options` what else makes sense in vLLM.

    Raises ConfigError for unknown, misplaced or wrong values.
    """
    given = additional if isinstance(additional, dict) else {}
    if not asks(compilation):
        return None
    flat = sorted({key for p in BUILTIN for key in (p.config_key, *p.aliases)} & given.keys())
    if flat:
        raise ConfigError(
            f"{', '.join(flat)} stands directly in additional_config; component sizes belong one "
            f"level down: additional_config={{{COMPONENT_SIZES!r}: {{{flat[0]!r}: ...}}}}."
        )
    known = [COMPONENT_SIZES, OPTIONS]
    for key in given:  # other plugins have keys of their own here
        if key not in known and difflib.get_close_matches(key, known, cutoff=0.7):
            hint = nearest_hint(key, known)
            raise ConfigError(f"unknown key {key!r} in additional_config.{hint}")
    options = given.get(OPTIONS, {})
    if not isinstance(options, dict):
        raise ConfigError(f"{OPTIONS} must be a mapping, not {type(options).__name__}.")
    for key in options:
        if key not in _OPTIONS:
            raise ConfigError(f"unknown option {key!r} in {OPTIONS}.{nearest_hint(key, _OPTIONS)}")
    sizes = {COMPONENT_SIZES: given.get(COMPONENT_SIZES)}
    return parse_options({"timeout_seconds": _TIMEOUT_SECONDS, **options, **sizes})


_KEPT = (
    "Of several compilation configs vLLM keeps the last, and options such as -cc.mode=3 count as "
    f"the last: give -cc.passes={PASS} beside them, or put all into one JSON."
)


def refuse_unused(additional: Any) -> None:
    """Raise ConfigError where sizes are set and the pass is not, as when vLLM drops `passes`.

    vLLM-Ascend reads the same key: where it is installed this is a warning.
    """
    if not isinstance(additional, dict) or not additional.get(COMPONENT_SIZES):
        return
    lost = (
        f'{COMPONENT_SIZES} is set in additional_config, but passes does not contain "{PASS}", so '
        "fgtp_pass would shard nothing."
    )
    if importlib.util.find_spec("vllm_ascend") is not None:
        log.warning(lost)
        return
    raise ConfigError(f"{lost} {_KEPT} To run unsharded, leave {COMPONENT_SIZES} out.")


def refuse_dropped(words: Sequence[str], kept: Any) -> None:
    """Raise ConfigError where a compilation config in a command line asks for the pass, and what
    vLLM kept of all of them does not, and nothing there says so.

    words: of the command line. kept: a `CompilationConfig`, a dict, or None.
    """
    configs: list[dict[str, Any]] = [{}]
    for word, following in itertools.pairwise([*words, ""]):
        option, given, value = word.partition("=")
        if option in ("-cc", "--compilation-config"):
            with contextlib.suppress(ValueError):  # not JSON, which vLLM's parser tells of
                config = json.loads(value if given else following)
                configs.append(config if isinstance(config, dict) else {})
    if any(map(asks, configs)) and not asks(kept) and "passes" not in configs[-1]:
        raise ConfigError(
            f'the command line asks for the pass "{PASS}" in a compilation config that vLLM drops, '
            f"so fgtp_pass would shard nothing. {_KEPT} To run unsharded, give -cc.passes=[]."
        )


def say_what_is_auto(additional: Any) -> None:
    """Say so where the pass is asked for and sizes are not."""
    if not isinstance(additional, dict) or COMPONENT_SIZES not in additional:
        log.info(
            'no %s in additional_config, so every component is "auto": by predicted cost with a '
            "decode_batch or an objective in %s, else the largest size within a host, but off for "
            "%s.",
            COMPONENT_SIZES,
            OPTIONS,
            " and ".join(p.component for p in BUILTIN if p.opt_in),
        )


def step_settings(config: Any) -> dict[str, str]:
    """What decides, beside the plan, which collectives a step runs and of what size.

    Ranks that differed in one of them would wait for each other without end: an eager rank for a
    compiled one, or one that pads to a captured CUDA graph for one that does not.
    """
    compilation, scheduler = config.compilation_config, config.scheduler_config
    speculative, lora = config.speculative_config, config.lora_config
    return {
        "compilation mode": str(compilation.mode),
        "cudagraph_mode": str(compilation.cudagraph_mode),
        "cudagraph_capture_sizes": str(compilation.cudagraph_capture_sizes),
        "dtype": str(config.model_config.dtype),
        "tensor_parallel_size": str(config.parallel_config.tensor_parallel_size),
        "max_num_seqs": str(scheduler.max_num_seqs),
        "max_num_batched_tokens": str(scheduler.max_num_batched_tokens),
        "num_speculative_tokens": str(speculative and speculative.num_speculative_tokens),
        "multimodal inputs or prompts as embeddings": str(embeds_outside(config.model_config)),
        "lora_target_modules": str(sorted(lora.target_modules or ["all"]) if lora else None),
    }


def embeds_outside(model_config: Any) -> bool:
    """Whether the runner embeds token ids before it calls the model, and so outside the graph."""
    return bool(model_config.enable_prompt_embeds or model_config.supports_multimodal_inputs)


_DRAFT_MODELS = ("eagle", "eagle3", "mtp", "draft_model")
_SPECULATION = ("ngram", "suffix", *_DRAFT_MODELS)


def is_drafter(model_config: Any, speculative: Any) -> bool:
    """Whether a `ModelConfig` is that of the model that drafts; guesses have the target's."""
    return (
        speculative is not None
        and speculative.method in _DRAFT_MODELS
        and model_config is speculative.draft_model_config
    )


def _classifies_by_tokens(model_config: Any) -> bool:
    """Whether vLLM makes a classifier of an lm_head, when it loads the weights."""
    keys = ("classifier_from_token", "method")
    configs = (model_config.hf_config, model_config.hf_text_config)
    return any(getattr(config, key, None) is not None for config in configs for key in keys)


SEQUENCE_PARALLEL = (
    "with tensor and expert parallelism at once vLLM's experts are sequence-parallel, and every "
    "tensor-parallel rank holds the shared ones whole"
)


def check_engine(config: Any, options: Options) -> None:
    """Raise ConfigError for what the pass does not support in a `VllmConfig`, with the reason."""
    parallel = config.parallel_config
    model, encoders = config.model_config, config.model_config.multimodal_config
    speculative, lora = config.speculative_config, config.lora_config
    refused = {
        "pipeline parallelism beside speculative decoding: not tried": (
            parallel.pipeline_parallel_size > 1 and speculative is not None
        ),
        "pipeline parallelism beside LoRA: not tried": (
            parallel.pipeline_parallel_size > 1 and lora is not None
        ),
        "data_parallel_size = 1: there is no other rank to share weights with": (
            parallel.data_parallel_size == 1
        ),
        "LoRA in models with experts: not tried": (
            lora is not None and config.model_config.get_num_experts() > 0
        ),
        "LoRA beside speculative decoding: not tried": (
            lora is not None and speculative is not None
        ),
        "batch-sharded sampling (enable_batch_sharded_sampling): not tried": bool(
            parallel.enable_batch_sharded_sampling
        ),
        "fully_sharded_loras: not tried": lora is not None and lora.fully_sharded_loras,
        "micro-batching (enable_dbo): two halves of a batch would share one group": (
            parallel.use_ubatching
        ),
        "elastic expert parallelism: component groups are fixed at start-up": (
            parallel.enable_elastic_ep
        ),
        "distributed_executor_backend='external_launcher': its ranks are not kept in step": (
            parallel.distributed_executor_backend == "external_launcher"
        ),
        f"speculative decoding by another method than {', '.join(_SPECULATION)}: not tried": (
            speculative is not None and speculative.method not in _SPECULATION
        ),
        "parallel_drafting: its lm_head runs at counts of rows that ranks do not know": (
            speculative is not None and speculative.parallel_drafting
        ),
        "drafts whose number changes (num_speculative_tokens_per_batch_size): ranks would draft "
        "different numbers of times": (
            speculative is not None and speculative.uses_dynamic_speculative_decoding()
        ),
        f"sharedexpert here: {SEQUENCE_PARALLEL}": (
            "sharedexpert" in options.sizes.requested and parallel.use_sequence_parallel_moe
        ),
        "drafters beside multimodal inputs, whose draft model would read the embedding outside the "
        "graph, too": (
            speculative is not None
            and speculative.method in _DRAFT_MODELS
            and model.supports_multimodal_inputs
        ),
        "models that encode and decode: not tried": model.is_encoder_decoder,
        "mm_encoder_only: there is no language model to share": (
            encoders is not None and encoders.mm_encoder_only
        ),
        "encoders on instances of their own (ec_transfer_config): not tried": (
            config.ec_transfer_config is not None
        ),
        "video_pruning_rate: it looks up token ids that other ranks do not know of": (
            encoders is not None and encoders.is_multimodal_pruning_enabled()
        ),
        "classifiers of rows of the lm_head (classifier_from_token): a rank may not hold them": (
            model.runner_type == "pooling" and _classifies_by_tokens(model)
        ),
        "pooling models with VLLM_ENABLE_V1_MULTIPROCESSING=0: an LLM within its rank's process "
        "keeps some of many prompts to embed back, and does not tell the others that it goes on; "
        "leave the variable out": (
            model.runner_type == "pooling"
            and os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "0"
        ),
    }
    for what, is_so in refused.items():
        if is_so:
            raise ConfigError(f'the pass "{PASS}" does not support {what}.')

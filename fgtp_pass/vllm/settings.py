"""What the user asked of the pass in a vLLM configuration, checked before anything is built."""

import difflib
import logging
from dataclasses import dataclass
from typing import Any

from fgtp_pass.config import parse_sizes
from fgtp_pass.errors import ConfigError
from fgtp_pass.patterns import BUILTIN
from fgtp_pass.sizes import COMPONENT_SIZES, ComponentSizes, nearest_hint

log = logging.getLogger("vllm.fgtp_pass")

PASS = "fgtp"
TIMEOUT = "fgtp_timeout_seconds"
_DEFAULT_TIMEOUT = 300.0  # vLLM's own limit for one step (VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS)


def check_passes(passes: list[str]) -> list[str]:
    """Raise ValueError for a name in `CompilationConfig.passes` that is no pass of ours."""
    for name in passes:
        if name != PASS:
            raise ValueError(f"unknown pass {name!r} in passes.{nearest_hint(name, [PASS])}")
    return passes


@dataclass(frozen=True)
class Settings:
    """sizes: what was asked per component. timeout_seconds: how long a rank waits for its group."""

    sizes: ComponentSizes
    timeout_seconds: float


def read_settings(compilation: Any, additional: Any) -> Settings | None:
    """The settings of a `CompilationConfig` and an `additional_config`; None without the pass.

    Raises ConfigError for unknown, misplaced or wrong values.
    """
    given = additional if isinstance(additional, dict) else {}
    requested = PASS in getattr(compilation, "passes", ())
    if not requested:
        if COMPONENT_SIZES in given:
            log.warning(
                '%s is set, but compilation_config has no "passes": ["%s"], so fgtp_pass shards '
                "nothing.",
                COMPONENT_SIZES,
                PASS,
            )
        return None
    flat = sorted({key for p in BUILTIN for key in (p.config_key, *p.aliases)} & given.keys())
    if flat:
        raise ConfigError(
            f"{', '.join(flat)} stands directly in additional_config; component sizes belong one "
            f"level down: additional_config={{{COMPONENT_SIZES!r}: {{{flat[0]!r}: ...}}}}."
        )
    known = [COMPONENT_SIZES, TIMEOUT]
    for key in given:  # other plugins have keys of their own here
        if key not in known and difflib.get_close_matches(key, known, cutoff=0.7):
            hint = nearest_hint(key, known)
            raise ConfigError(f"unknown key {key!r} in additional_config.{hint}")
    timeout = given.get(TIMEOUT, _DEFAULT_TIMEOUT)
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or timeout <= 0:
        raise ConfigError(f"{TIMEOUT} must be a positive number of seconds, not {timeout!r}.")
    return Settings(parse_sizes(given.get(COMPONENT_SIZES)), float(timeout))


# drafters that have no layers of their own to run, and share none with the model
_SPECULATION = ("ngram", "suffix")


def check_engine(config: Any) -> None:
    """Raise ConfigError for what the pass does not support in a `VllmConfig`, with the reason."""
    parallel = config.parallel_config
    speculative = config.speculative_config
    refused = {
        "pipeline_parallel_size > 1": parallel.pipeline_parallel_size > 1,
        "data_parallel_size = 1: there is no other rank to share weights with": (
            parallel.data_parallel_size == 1
        ),
        "LoRA: it replaces layers by their type and would leave the sharded ones out": (
            config.lora_config is not None
        ),
        "micro-batching (enable_dbo): two halves of a batch would share one group": (
            parallel.use_ubatching
        ),
        "elastic expert parallelism: component groups are fixed at start-up": (
            parallel.enable_elastic_ep
        ),
        "distributed_executor_backend='external_launcher': its ranks are not kept in step": (
            parallel.distributed_executor_backend == "external_launcher"
        ),
        f"speculative decoding by another method than {' or '.join(_SPECULATION)}: drafters run "
        "the lm_head or the embedding a number of times that idle ranks do not know": (
            speculative is not None and speculative.method not in _SPECULATION
        ),
        "pooling models": config.model_config.runner_type != "generate",
    }
    for what, is_so in refused.items():
        if is_so:
            raise ConfigError(f'the pass "{PASS}" does not support {what}.')

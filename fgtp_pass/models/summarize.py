"""Models to plan: from a name, a checkpoint folder or a config.json to sites, without weights.

The model is built on the meta device and traced with one layer of each distinct kind; the sites of
that layer then stand for those of all layers like it. What was found is kept on disk.
"""

from collections.abc import Callable

from fgtp_pass import disk_cache
from fgtp_pass.cost.model_summary import ModelSummary
from fgtp_pass.hints import needs_extra
from fgtp_pass.models.config_json import read_config


def summarize(model: str, progress: Callable[[str], None] = lambda _: None) -> ModelSummary:
    """The summary of a model, from disk if this config was traced before with these versions.

    progress: is told what is being done. Raises ConfigError for a config that transformers cannot
    build, or whose graph has no component.
    """
    config = read_config(model)
    at = disk_cache.path_of("model", config, disk_cache.code_stamp("torch", "transformers"))
    kept = disk_cache.load(at, ModelSummary)
    if kept is not None:
        return kept.model_copy(update={"name": model})
    try:
        import transformers  # noqa: F401
    except ImportError:
        raise needs_extra("cli", "models that were not traced before") from None
    from fgtp_pass.models.trace_layers import trace_summary

    summary = trace_summary(model, config, progress)
    try:
        disk_cache.save(at, summary)
    except OSError as error:
        progress(f"not kept for next time: {error}")
    return summary

"""Models to plan: from a name, a checkpoint folder or a config.json to sites, without weights.

The model is built on the meta device and traced with one layer of each distinct kind; the sites of
that layer then stand for those of all layers like it. What was found is kept on disk.
"""

import functools
import json
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from fgtp_pass import cache
from fgtp_pass.sizes import config_error, unknown
from fgtp_pass.summary import ModelSummary

# names ------------------------------------------------------------------------------------------


@functools.cache
def shipped() -> Mapping[str, Path]:
    """The configs that come with the package, by their Hugging Face name."""
    folder = Path(str(files("fgtp_pass") / "configs"))
    return {path.stem.replace("--", "/"): path for path in sorted(folder.glob("*.json"))}


def read_config(model: str) -> dict[str, Any]:
    """The config of a Hugging Face name, a checkpoint folder or a config.json.

    Names of `shipped` configs need no network. Raises ConfigError for anything that has none.
    """
    path = Path(model)
    if path.is_dir():
        path = path / "config.json"
        if not path.is_file():
            raise config_error(f"the folder {model} has no config.json")
    elif not path.is_file():
        if path.suffix == ".json":
            raise config_error(f"there is no file {model}")
        path = shipped().get(model) or _download(model)
    try:
        config = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise config_error(f"{path} is not a config.json: {error}") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise config_error(f"{path} is not a model's config.json: it has no model_type")
    return config


def _download(name: str) -> Path:
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise needs_extra("cli", "Hugging Face names") from None
    try:
        return Path(hf_hub_download(name, "config.json"))
    except Exception as error:  # many classes, for one outcome
        known = unknown("model", name, list(shipped()), "what comes with fgtp_pass")
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise config_error(
            f"{known} A folder or a config.json works too. (Hugging Face: {first})"
        ) from None


def needs_extra(extra: str, what: str) -> Exception:
    return config_error(f"{what} need the extra {extra!r}: pip install 'fgtp-pass[{extra}]'")


# summaries --------------------------------------------------------------------------------------


def summarize(model: str, progress: Callable[[str], None] = lambda _: None) -> ModelSummary:
    """The summary of a model, from disk if this config was traced before with these versions.

    progress: is told what is being done. Raises ConfigError for a config that transformers cannot
    build, or whose graph has no component.
    """
    config = read_config(model)
    at = cache.path_of("model", config, cache.code_stamp("torch", "transformers"))
    kept = cache.load(at, ModelSummary)
    if kept is not None:
        return kept.model_copy(update={"name": model})
    try:
        import transformers  # noqa: F401
    except ImportError:
        raise needs_extra("cli", "models that were not traced before") from None
    from fgtp_pass.tracing import trace_summary

    summary = trace_summary(model, config, progress)
    try:
        cache.save(at, summary)
    except OSError as error:
        progress(f"not kept for next time: {error}")
    return summary

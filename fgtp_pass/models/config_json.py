"""Where the config.json of a model is: by Hugging Face name, checkpoint folder or file."""

import functools
import json
import os
import re
import socket
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from fgtp_pass.hints import config_error, needs_extra, unknown

_SECONDS_TO_ANSWER = 5


@functools.cache
def shipped() -> Mapping[str, Path]:
    """The configs that come with the package, by their Hugging Face name."""
    folder = Path(str(files("fgtp_pass.models") / "configs"))
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
        from huggingface_hub import hf_hub_download, try_to_load_from_cache
    except ImportError:
        raise needs_extra("cli", "Hugging Face names") from None
    kept = try_to_load_from_cache(name, "config.json") if _is_name(name) else None
    if isinstance(kept, str):
        return Path(kept)
    try:
        if not _is_name(name):
            raise ValueError("no name of a model has this form")
        _check_reachable()
        return Path(hf_hub_download(name, "config.json"))
    except Exception as error:  # many classes, for one outcome
        known = unknown("model", name, list(shipped()), "what comes with fgtp_pass")
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise config_error(
            f"{known} A folder or a config.json works too. (Hugging Face: {first})"
        ) from None


def _is_name(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None


def _check_reachable() -> None:
    """Raise OSError at once where nobody answers; the client would try again for a minute."""
    if getproxies():
        return
    host = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    port = host.port or (443 if host.scheme == "https" else 80)
    socket.create_connection((host.hostname or "", port), _SECONDS_TO_ANSWER).close()

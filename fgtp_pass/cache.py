"""What is kept on disk between runs: summaries of models, plans for vLLM, measurements."""

import hashlib
import json
import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

Kept = TypeVar("Kept", bound=BaseModel)


def cache_folder() -> Path:
    """The folder of all that is kept: $FGTP_CACHE_DIR, or the user's cache folder."""
    given = os.environ.get("FGTP_CACHE_DIR")
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(given) if given else Path(base) / "fgtp_pass"


def path_of(kind: str, *key: Any) -> Path:
    """Where something of a kind is kept that depends on `key`, which JSON can hold."""
    text = json.dumps(key, sort_keys=True)
    return cache_folder() / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"


def load(path: Path, kind: type[Kept]) -> Kept | None:
    """What is kept there; None if there is nothing, or nothing that can be read."""
    try:
        return kind.model_validate_json(path.read_text())
    except (OSError, ValidationError):
        return None


def save(path: Path, value: BaseModel) -> None:
    """Keep it. Raises OSError where that cannot be done."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value.model_dump_json())


def code_stamp(*distributions: str) -> list[str]:
    """Changes with every file of this package, and with the versions of these distributions."""
    sources = sorted(Path(__file__).parent.glob("**/*.py"))
    stamps = [f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in sources]
    return [f"{name} {_version(name)}" for name in ("fgtp-pass", *distributions)] + stamps


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return ""

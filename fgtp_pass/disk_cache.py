"""What is kept on disk between runs: summaries of models, plans for vLLM, measurements.

It is there to save time, so whatever cannot be read is as if it were not there.
"""

import hashlib
import json
import os
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

Kept = TypeVar("Kept", bound=BaseModel)


def cache_folder() -> Path:
    """The folder of all that is kept: $FGTP_CACHE_DIR, or the user's cache folder; for a user
    without a home, as in many containers, one of the folder for temporary files.
    """
    if given := os.environ.get("FGTP_CACHE_DIR"):
        return Path(given)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "fgtp_pass"
    try:
        return Path.home() / ".cache" / "fgtp_pass"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"fgtp_pass-{os.getuid()}"


def path_of(kind: str, *key: Any) -> Path:
    """Where something of a kind is kept that depends on `key`, which JSON can hold."""
    text = json.dumps(key, sort_keys=True)
    return cache_folder() / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"


def load(path: Path, kind: type[Kept]) -> Kept | None:
    """What is kept there; None if there is nothing, or nothing that can be read."""
    try:
        return kind.model_validate_json(path.read_text())
    except (OSError, ValueError):  # pydantic's errors are ValueErrors, as are those of decoding
        return None


def save(path: Path, value: BaseModel) -> None:
    """Keep it; who reads sees the old or the new. Raises OSError if it cannot be done."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        try:
            file.write(value.model_dump_json())
            file.flush()
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


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

"""The versions of torch that the pass supports."""

import re
import warnings
from importlib.metadata import PackageNotFoundError, version

import torch

from fgtp_pass.errors import FgtpError

MINIMUM_TORCH, NEWEST_TESTED_TORCH = (2, 11), (2, 15)  # `make test-versions` runs both


def check_torch(found: str | None = None) -> None:
    """Raise FgtpError if torch is older than the supported range, warn if it is newer."""
    found = found or torch.__version__
    numbers = re.match(r"(\d+)\.(\d+)", found)
    release = tuple(map(int, numbers.groups())) if numbers else (0, 0)
    minimum, newest = (".".join(map(str, n)) for n in (MINIMUM_TORCH, NEWEST_TESTED_TORCH))
    if release < MINIMUM_TORCH:
        raise FgtpError(
            f"torch {found} is not supported: fgtp_pass needs torch >= {minimum}. Upgrade torch."
        )
    if release > NEWEST_TESTED_TORCH:
        warnings.warn(
            f"torch {found} is newer than any that fgtp_pass was tested with ({minimum} to "
            f"{newest}). Compare a few outputs with those of the unsharded model.",
            stacklevel=2,
        )


def library_versions() -> dict[str, str]:
    """What the ranks of a group must have in common."""
    try:
        own = version("fgtp-pass")
    except PackageNotFoundError:  # run from a source tree that is not installed
        own = "source"
    return {"torch": torch.__version__, "fgtp_pass": own}

"""The versions of torch that the pass supports."""

import re
from importlib.metadata import PackageNotFoundError, version

import torch

from fgtp_pass.errors import FgtpError

MINIMUM_TORCH = (2, 11)


def check_torch(found: str | None = None) -> None:
    """Raise FgtpError if torch is older than the supported range."""
    found = found or torch.__version__
    numbers = re.match(r"(\d+)\.(\d+)", found)
    if numbers is None or tuple(map(int, numbers.groups())) < MINIMUM_TORCH:
        minimum = ".".join(map(str, MINIMUM_TORCH))
        raise FgtpError(
            f"torch {found} is not supported: fgtp_pass needs torch >= {minimum}. Upgrade torch."
        )


def library_versions() -> dict[str, str]:
    """What the ranks of a group must have in common."""
    try:
        own = version("fgtp-pass")
    except PackageNotFoundError:  # run from a source tree that is not installed
        own = "source"
    return {"torch": torch.__version__, "fgtp_pass": own}

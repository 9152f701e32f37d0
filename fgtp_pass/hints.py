"""Wording that errors share: the nearest known name, the extra to install."""

import difflib
from collections.abc import Iterable


def config_error(message: str) -> Exception:
    """The ConfigError to raise. Its base class is one of torch's compiler: loaded when needed."""
    from fgtp_pass.errors import ConfigError

    return ConfigError(message)


def nearest_hint(given: object, known: Iterable[str]) -> str:
    """What may have been meant by a name that is not known, as a sentence to append."""
    names = list(known)
    nearest = difflib.get_close_matches(str(given), names, n=1, cutoff=0.4)
    return f" Did you mean {nearest[0]!r}?" if nearest else f" Known: {', '.join(names)}."


def unknown(what: str, given: str, known: Iterable[str], where: str) -> str:
    """A sentence about a name that nobody knows, with the nearest one that somebody does."""
    return f"unknown {what} {given!r} in {where}.{nearest_hint(given, known)}"


def needs_extra(extra: str, what: str) -> Exception:
    """The error for a package that is not installed, with the extra that brings it."""
    return config_error(f"{what} need the extra {extra!r}: {install_extra(extra)}")


def install_extra(extra: str) -> str:
    """How to install an extra."""
    return f"in the checkout of fgtp_pass, pip install '.[{extra}]'"

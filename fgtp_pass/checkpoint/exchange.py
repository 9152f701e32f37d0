"""What loading, saving and updating say to each other."""

from typing import Any

from fgtp_pass.agreement.meeting import Meeting
from fgtp_pass.agreement.message import Intent
from fgtp_pass.errors import ConfigError


def exchange(control: Meeting | None, payload: Any) -> list[Any]:
    """What each rank says, in their order; without other ranks only this one's."""
    if control is None:
        return [payload]
    return [message.payload for message in control.exchange(Intent.LOAD, payload=payload)]


def checked_source(source: str) -> str:
    """Raise ConfigError unless it says where weights come from."""
    if source not in ("local", "rank0"):
        raise ConfigError(f'source must be "local" or "rank0", not {source!r}.')
    return source

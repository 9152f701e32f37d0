"""What is said of ranks that others wait for."""

import logging
import math
from collections.abc import Callable, Iterable, Sequence

log = logging.getLogger("fgtp_pass")

NOTICE_SECONDS = 5.0  # a wait that is longer is told, once, when it is known for whom


def listed(ranks: Iterable[int]) -> str:
    """[1] -> "rank 1"; [1, 2, 5] -> "ranks 1, 2, 5"; at most eight by number."""
    numbers = sorted(ranks)
    shown = ", ".join(map(str, numbers[:8]))
    more = f" and {len(numbers) - 8} more" if len(numbers) > 8 else ""
    return f"rank{'s' if len(numbers) > 1 else ''} {shown}{more}"


def absent(ranks: Sequence[int], seconds: float, purpose: str) -> str:
    """A sentence about ranks that did not come."""
    return (
        f"{listed(ranks)} did not come within {seconds:g} s, {purpose}: ended, hangs, does "
        "something else, or does not use fgtp_pass. Look at its own output."
    )


class Notice:
    """Tells of one wait, when it has become long, who waits for whom, and what for."""

    def __init__(self, rank: int, purpose: str, missing: Callable[[], Sequence[int]]):
        self._rank, self._purpose, self._missing = rank, purpose, missing
        self._next = NOTICE_SECONDS

    def __call__(self, waited: float) -> None:
        if waited < self._next:
            return
        missing = self._missing()
        self._next = math.inf if missing else waited + NOTICE_SECONDS
        if missing:
            log.warning(
                "rank %d has waited %.0f s for %s, %s",
                self._rank,
                waited,
                listed(missing),
                self._purpose,
            )

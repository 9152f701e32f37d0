"""One line in the log when a rank has waited for others for long: who, for whom, where, since when.

A thread looks once a second at what this process is in. It costs a step no more than a note of when
it began: only once a wait has become long do the ranks compare, on the board, how far each is.
"""

import functools
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from fgtp_pass.collectives.board import Board, BoardLostError
from fgtp_pass.collectives.waits import NOTICE_SECONDS, listed

log = logging.getLogger("fgtp_pass")

_LOOK_SECONDS = 1.0

# How far a rank has come: exchanges, then collectives of the step behind the last of them.
Position = tuple[int, int]


@dataclass(eq=False)
class Wait:
    """What a rank is in, and what can only end when others come.

    place: where on the board the `ranks` write. position: how far this rank has come. purpose: what
    it waits for, given its position.
    """

    board: Board
    place: str
    rank: int
    ranks: range
    position: Callable[[], Position]
    purpose: Callable[[Position], str]
    since: float = field(default_factory=time.monotonic)
    told: bool = False

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.since

    def look(self) -> None:
        """Tell of the wait if it has become long, and others are behind."""
        waited = self.seconds
        if self.told or waited < NOTICE_SECONDS:
            return
        self.told = True
        mine = self.position()
        try:
            behind = self._behind(mine)
        except BoardLostError as lost:
            behind = []
            said = self.rank, waited, self.purpose(mine), lost
            log.warning("rank %d has waited %.0f s %s; %s", *said)
        if behind and self in _waits:
            log.warning(
                "rank %d has waited %.0f s for %s, %s",
                self.rank,
                waited,
                listed(behind),
                self.purpose(mine),
            )

    def _behind(self, mine: Position) -> list[int]:
        """The ranks that have not come as far as this one."""
        keys = {f"{self.place}/at/{rank}": rank for rank in self.ranks}
        self.board.write(f"{self.place}/at/{self.rank}", mine)
        time.sleep(_LOOK_SECONDS)  # those who wait as well say so now
        found = self.board.read(list(keys))
        return [rank for key, rank in keys.items() if found.get(key, (-1, -1)) < mine]


_waits: list[Wait] = []


@contextmanager
def watched(wait: Wait) -> Iterator[None]:
    """Have the thread look at the wait for as long as this is entered."""
    _start()
    _waits.append(wait)
    try:
        yield
    finally:
        _waits.remove(wait)


@functools.cache
def _start() -> None:
    threading.Thread(target=_look_forever, name="fgtp-watch", daemon=True).start()


def _look_forever() -> None:
    while True:
        time.sleep(_LOOK_SECONDS)
        for wait in list(_waits):
            wait.look()

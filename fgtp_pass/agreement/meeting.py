"""`Meeting`: all data-parallel ranks in exchange, by way of the board.

Rare (when a graph is compiled first), so it needs no connection between any two ranks: rank 0 reads
what each wrote, and writes what all said, once, however many said it. What the others ask of the
store does not grow with their number.
"""

import pickle
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from fgtp_pass.agreement.message import Intent, Message, require_one_purpose
from fgtp_pass.collectives.board import BoardLostError
from fgtp_pass.collectives.groups import DataParallelGroup
from fgtp_pass.collectives.waits import Notice, absent, listed
from fgtp_pass.errors import AgreementError

_GRACE_SECONDS = 2.0  # for what rank 0 has to say once it has given up

_LAST = "verdict"  # in Board.seen: rank 0's word of the last meeting

_Said = tuple[Intent, Any]


@dataclass(frozen=True)
class _Verdict:
    """What rank 0 made of a meeting: who said what, who did not come."""

    said: tuple[tuple[_Said, tuple[int, ...]], ...]
    absent: tuple[int, ...]


class Meeting:
    """All ranks of a data-parallel group in exchange."""

    def __init__(self, group: DataParallelGroup):
        self._group = group
        self.timeout_seconds = group.timeout.total_seconds()

    @property
    def size(self) -> int:
        return self._group.size

    def exchange(self, intent: Intent, payload: Any = None) -> list[Message]:
        """Exchange messages; returns those of all ranks, in rank order. Collective.

        Raises AgreementError on every rank when one failed, when they came to do different things,
        or when they were not all here at once within the timeout. All can then meet again.
        """
        try:
            verdict = self._meet((intent, payload))
        except BoardLostError as lost:
            text = f"rank {self._group.rank} cannot meet the others: {lost}."
            raise AgreementError(text, shared=True, away=True) from None
        if verdict.absent:
            text = absent(verdict.absent, self.timeout_seconds, intent.purpose)
            raise AgreementError(text, shared=True, away=True)
        messages = [
            Message(rank, intent, payload=payload)
            for (intent, payload), ranks in verdict.said
            for rank in ranks
        ]
        messages.sort(key=lambda message: message.rank)
        require_one_purpose(messages)
        return messages

    def require_equal(self, mine: Mapping[str, Any]) -> None:
        """Raise AgreementError on every rank, with what each has, unless all have the same."""
        messages = self.exchange(Intent.SHARD, payload=mine)
        for what in mine:
            said: dict[str, list[int]] = {}
            for message in messages:
                said.setdefault(str(message.payload.get(what)), []).append(message.rank)
            if len(said) > 1:
                each = "; ".join(f"{listed(ranks)} has {value}" for value, ranks in said.items())
                raise AgreementError(
                    f"the data-parallel ranks differ in {what}: {each}. "
                    "They must run the same model with the same options and libraries.",
                    shared=True,
                )

    def _meet(self, mine: _Said) -> _Verdict:
        """What comes of a meeting of all ranks, or of those that came within the timeout."""
        board, own, word = self._group.board, f"came/{self._group.rank}", uuid.uuid4().hex
        board.write(own, (word, mine), self.timeout_seconds)
        verdict = (self._lead if self._group.rank == 0 else self._follow)(word, mine)
        if verdict.absent:
            board.erase(own)  # whoever comes now shall not take this rank for one that waits
        return verdict

    def _lead(self, word: str, mine: _Said) -> _Verdict:
        board = self._group.board
        keys = {f"came/{rank}": rank for rank in range(1, self._group.size)}

        def missing() -> tuple[int, ...]:
            here = board.read(list(keys), self.timeout_seconds)
            away = tuple(rank for key, rank in keys.items() if not board.is_new(key, here.get(key)))
            board.write("away", (word, away), self.timeout_seconds)
            return away

        notice = Notice(0, mine[0].purpose, missing)
        found = board.wait(list(keys), self.timeout_seconds, notice, board.is_new)
        away = tuple(rank for key, rank in keys.items() if key not in found)
        said = {0: mine} | {keys[key]: one for key, (_, one) in found.items()}
        verdict = _Verdict(_distinct(said), away)
        board.write(f"verdict/{word}", verdict, self.timeout_seconds)
        heard = {f"heard/{other}": word for other, _ in found.values()}
        board.write_all(heard, self.timeout_seconds)
        board.seen.update(found if not away else {})
        if _LAST in board.seen:
            board.erase(f"verdict/{board.seen[_LAST]}")
        board.seen[_LAST] = word
        return verdict

    def _follow(self, word: str, mine: _Said) -> _Verdict:
        board, rank = self._group.board, self._group.rank

        def missing() -> tuple[int, ...]:
            """What rank 0 knows: if each looked for itself, requests would grow with the square."""
            found = board.read(["came/0", "away"], self.timeout_seconds)
            leader, _ = found.get("came/0", ("", None))
            if leader in ("", board.seen.get(_LAST)):
                return (0,)
            at, away = found.get("away", ("", ()))
            return tuple(other for other in away if other != rank) if at == leader else ()

        notice = Notice(rank, mine[0].purpose, missing)
        heard = f"heard/{word}"
        found = board.wait([heard], self.timeout_seconds + _GRACE_SECONDS, notice)
        if not found:
            return _Verdict((), missing() or (0,))
        board.seen[_LAST] = found[heard]
        verdict = f"verdict/{found[heard]}"
        given = board.wait([verdict], self.timeout_seconds)
        board.erase(heard)
        # rank 0 may have met again since, without this rank
        return cast(_Verdict, given.get(verdict, _Verdict((), (0,))))


def _distinct(said: Mapping[int, _Said]) -> tuple[tuple[_Said, tuple[int, ...]], ...]:
    """What was said, once, with who said it: mostly all ranks say the same."""
    found: dict[bytes, tuple[_Said, list[int]]] = {}
    for rank, value in said.items():
        found.setdefault(pickle.dumps(value), (value, []))[1].append(rank)
    return tuple((value, tuple(ranks)) for value, ranks in found.values())

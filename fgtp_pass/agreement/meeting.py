"""`Meeting`: all data-parallel ranks in exchange, by way of the board.

Rare (when a graph is compiled first), so it needs no connection between any two ranks: rank 0 reads
what each wrote, and writes what all said, once, however many said it.
"""

import pickle
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fgtp_pass.agreement.message import Intent, Message, require_one_purpose
from fgtp_pass.collectives.board import BoardLostError
from fgtp_pass.collectives.groups import DataParallelGroup
from fgtp_pass.collectives.waits import Notice, absent, listed
from fgtp_pass.errors import AgreementError

_GRACE_SECONDS = 2.0  # for what rank 0 has to say once it has given up

_Said = tuple[Intent, Any]


@dataclass(frozen=True)
class _Verdict:
    """What rank 0 made of a meeting: who came (by a word of their own), who said what, who did not
    come."""

    words: frozenset[str]
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
        group, board = self._group, self._group.board
        keys = {f"came/{rank}": rank for rank in range(group.size)}
        word, own = uuid.uuid4().hex, f"came/{group.rank}"

        def missing() -> list[int]:
            here = board.read(list(keys))
            return [rank for key, rank in keys.items() if not board.is_new(key, here.get(key))]

        notice = Notice(group.rank, mine[0].purpose, missing)
        board.write(own, (word, mine))
        if group.rank == 0:
            found = board.wait(list(keys), self.timeout_seconds, notice, board.is_new)
            away = tuple(rank for key, rank in keys.items() if key not in found)
            said = {keys[key]: one for key, (_, one) in found.items()}
            words = frozenset(one for one, _ in found.values())
            verdict = _Verdict(words, _distinct(said), away)
            board.write("verdict", verdict)
            board.seen.update(found if not away else {})
        else:
            seconds = self.timeout_seconds + _GRACE_SECONDS
            heard = board.wait(["verdict"], seconds, notice, lambda _, given: word in given.words)
            verdict = heard.get("verdict") or _Verdict(frozenset(), (), tuple(missing()) or (0,))
        if verdict.absent:
            board.erase(own)  # whoever comes now shall not take this rank for one that waits
        return verdict


def _distinct(said: Mapping[int, _Said]) -> tuple[tuple[_Said, tuple[int, ...]], ...]:
    """What was said, once, with who said it: mostly all ranks say the same."""
    found: dict[bytes, tuple[_Said, list[int]]] = {}
    for rank, value in said.items():
        found.setdefault(pickle.dumps(value), (value, []))[1].append(rank)
    return tuple((value, tuple(ranks)) for value, ranks in found.values())

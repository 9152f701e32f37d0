"""`ControlGroup`: ranks that run in step, so that a mismatch is an error and not a hang.

Before every step a rank exchanges a header of fixed size with its group, and a payload only if
something is not as usual. A rank that failed, that does something else, or that has another number
of tokens is so made known to all. What fails on the way is told with who caused it.
"""

import logging
import pickle
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

import torch

from fgtp_pass.agreement.cause import cause_of, is_connection_error, tell
from fgtp_pass.agreement.meeting import Meeting
from fgtp_pass.agreement.message import Intent, Message, require_one_purpose
from fgtp_pass.agreement.watch import Position, Wait, watched
from fgtp_pass.collectives.groups import DataParallelGroup
from fgtp_pass.errors import AgreementError

log = logging.getLogger("fgtp_pass")


_HEADER_INTS = 64

# Ranks meet in the order in which each calls, so threads that meet for one process take turns.
ONE_AT_A_TIME = threading.RLock()


class Exchange(Protocol):
    """Ranks that exchange messages: a `ControlGroup`, or a `Meeting` of all."""

    def exchange(self, intent: Intent, payload: Any = None) -> list[Message]: ...


class ControlGroup:
    """This rank's group of `size` consecutive data-parallel ranks, which run in step.

    It holds all the component groups of its ranks. Compiled models may share one.
    """

    def __init__(self, group: DataParallelGroup, size: int):
        self.size = size
        self.first_rank = group.rank // size * size
        self.timeout_seconds = group.timeout.total_seconds()
        self._group = group
        self._words = group.words(size)
        self._all = torch.zeros(size * _HEADER_INTS, dtype=torch.int64)

    def exchange(
        self,
        intent: Intent,
        payload: Any = None,
        *,
        sites: int = 0,
        counts: int = 0,
        tokens: Sequence[int] = (),
    ) -> list[Message]:
        """Exchange messages; returns those of all ranks, in rank order. Collective.

        Raises AgreementError on every rank when one failed, when they came to do different
        things, or when one does not come within the timeout. Costs one all_gather of 512 bytes
        per rank when all came for a STEP. After a failure it first connects the ranks again.
        """
        header = [int(intent), sites, counts, len(tokens), *tokens]
        if len(header) > _HEADER_INTS:
            raise AgreementError(
                f"a graph with {len(tokens)} components has more than the {_HEADER_INTS - 4} of "
                "which ranks can compare token counts"
            )
        mine = torch.tensor(header + [0] * (_HEADER_INTS - len(header)), dtype=torch.int64)
        words = self.connect()
        self._words.exchanges += 1
        with self._together(lambda: (self._words.exchanges, 0), lambda _: intent.purpose):
            words._allgather_base(self._all, mine).wait()
        rows = self._all.view(self.size, _HEADER_INTS).tolist()
        messages = [
            Message(self.first_rank + i, Intent(row[0]), row[1], row[2], tuple(row[4 : 4 + row[3]]))
            for i, row in enumerate(rows)
        ]
        if all(message.intent is Intent.STEP for message in messages):
            return messages
        with self._together(lambda: (self._words.exchanges, 1), lambda _: intent.purpose):
            said = _gather_objects(words, payload)
        messages = [replace(m, payload=one) for m, one in zip(messages, said, strict=True)]
        require_one_purpose(messages)
        return messages

    def connect(self) -> Any:
        """The connected group; connects all groups within it again that a failure has closed."""
        words = self._words.open()
        self._group.reopen(self.size)
        return words

    @contextmanager
    def running(self, collectives: Sequence[str]) -> Iterator[None]:
        """What is done here runs these collectives, by name and in this order. Connects if need be.

        If it fails on this rank, the others fail at once too. If it fails because of others, it
        raises AgreementError, which names them.
        """
        self.connect()
        before = self._group.collectives_started(self.size)

        def position() -> Position:
            return self._words.exchanges, 2 + self._group.collectives_started(self.size) - before

        def purpose(at: Position) -> str:
            number = at[1] - 2
            if not 0 < number <= len(collectives):
                return "in a step"
            return f"in a step, in {collectives[number - 1]} ({number} of {len(collectives)})"

        with self._together(position, purpose):
            yield

    @contextmanager
    def _together(
        self, position: Callable[[], Position], purpose: Callable[[Position], str]
    ) -> Iterator[None]:
        group, place = self._group, self._words.key
        ranks = range(self.first_rank, self.first_rank + self.size)
        wait = Wait(group.board, place, group.rank, ranks, position, purpose)
        try:
            with watched(wait):
                yield
        except AgreementError:
            raise  # told already
        except BaseException as error:
            where, waited = purpose(position()), wait.seconds
            tell(group.board, place, group.rank, error)
            cut = group.close(self.size)
            if not is_connection_error(error):
                raise
            others = [rank for rank in ranks if rank != group.rank]
            cause = cause_of(error, group.board, place, others, self.timeout_seconds)
            then = (
                "Once all ranks have come back, the next call connects them again."
                if cut
                else "Start all ranks again: what waits on their devices cannot be stopped."
            )
            raise AgreementError(
                f"rank {group.rank} waited {waited:.0f} s {where}, in vain: {cause}. {then}",
                shared=True,
                away=True,
            ) from error


def _gather_objects(words: Any, mine: Any) -> list[Any]:
    """What each rank gives, in rank order."""
    data = torch.frombuffer(bytearray(pickle.dumps(mine)), dtype=torch.uint8)
    sizes = torch.empty(words.size(), dtype=torch.int64)
    words._allgather_base(sizes, torch.tensor([len(data)])).wait()
    padded = torch.zeros(int(sizes.max()), dtype=torch.uint8)
    padded[: len(data)] = data
    gathered = torch.empty(len(sizes) * len(padded), dtype=torch.uint8)
    words._allgather_base(gathered, padded).wait()
    parts = gathered.view(len(sizes), -1)
    return [
        pickle.loads(bytes(part[:size].tolist()))
        for part, size in zip(parts, sizes.tolist(), strict=True)
    ]


def all_ranks(group: DataParallelGroup) -> Meeting:
    """All data-parallel ranks: they agree on plans."""
    return Meeting(group)


def report_failure(control: Exchange, error: Exception) -> None:
    """Say why this rank fails, so that the others raise too; its own error stays the first.

    An error that the others have raised, or heard of, is not told again: no one listens any more.
    """
    if _is_known(error):
        return
    error._fgtp_reported = True  # type: ignore[attr-defined]
    try:
        control.exchange(Intent.FAILED, payload=f"{type(error).__name__}: {error}")
    except AgreementError as heard:
        log.debug("reported to the group: %s", heard)


def _is_known(error: BaseException | None) -> bool:
    """Whether it comes from an exchange, or was reported; Dynamo may have wrapped it since."""
    while error is not None:
        shared = isinstance(error, AgreementError) and error.shared
        if shared or hasattr(error, "_fgtp_reported"):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def reporting_failure(control: Exchange | None) -> Iterator[None]:
    """Let the others raise too if what is done here fails; None: there is no one to tell."""
    try:
        yield
    except Exception as error:
        if control is not None:
            report_failure(control, error)
        raise

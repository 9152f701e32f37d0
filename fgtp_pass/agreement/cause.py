"""When ranks fail together: which of them is the cause, said on every rank that is left.

A rank that raises cuts its connections, and the system cuts those of one that dies, so the others
fail at once; one that hangs is given up after the timeout. Then each says on the board what it saw,
and asks what the others say.
"""

import contextlib
from collections.abc import Sequence

import torch.distributed as dist

from fgtp_pass.collectives.board import Board, BoardLostError
from fgtp_pass.collectives.waits import listed
from fgtp_pass.errors import first_line

_ANSWER_SECONDS = 4.0  # for ranks that fail at the same time, but not in the same instant


def tell(board: Board, place: str, rank: int, error: BaseException) -> None:
    """Say why this rank fails; a board that is lost is no reason to fail otherwise."""
    with contextlib.suppress(BoardLostError):
        board.write(f"{place}/why/{rank}", (_kind(error), first_line(error)))


def cause_of(
    error: BaseException, board: Board, place: str, ranks: Sequence[int], timeout_seconds: float
) -> str:
    """Who of the other ranks caused the error of a connection, and why, as far as they say.

    ranks: the others. place: where on the board they all `tell`.
    """
    keys = {f"{place}/why/{rank}": rank for rank in ranks}
    try:
        found = board.wait(list(keys), _ANSWER_SECONDS)
    except BoardLostError as lost:
        return str(lost)
    said = {keys[key]: why for key, why in found.items()}
    failed = [f"rank {rank} failed: {text}" for rank, (kind, text) in said.items() if kind == _OWN]
    if failed:
        return "; ".join(failed)
    silent = [rank for rank in ranks if rank not in said]
    if silent:
        late = _kind(error) == _TIMED_OUT
        away = f"did not come within {timeout_seconds:g} s" if late else "ended"
        verb = "does" if len(silent) == 1 else "do"
        return f"{listed(silent)} {away} and {verb} not answer: look at its own output"
    if _kind(error) == _TIMED_OUT:
        return f"{listed(ranks)} did not come within {timeout_seconds:g} s, only later"
    gave_up = [rank for rank, (kind, _) in said.items() if kind == _TIMED_OUT]
    if gave_up:
        return f"{listed(gave_up)} had given up waiting after {timeout_seconds:g} s"
    return f"the connection with {listed(ranks)} broke ({first_line(error)})"


_OWN, _TIMED_OUT, _CUT = "own", "timed out", "cut"


def is_connection_error(error: BaseException) -> bool:
    """Whether it says that another rank is away, and not what went wrong on this one."""
    return _kind(error) != _OWN


def _kind(error: BaseException) -> str:
    # gloo raises plain RuntimeErrors
    text = str(error) if type(error) is RuntimeError or isinstance(error, dist.DistError) else ""
    if any(mark in text for mark in ("Timed out", "timed out", "timeout")):
        return _TIMED_OUT
    marks = ("Connection closed", "Connection reset", "Broken pipe", "gloo/transport")
    if isinstance(error, dist.DistError) or any(mark in text for mark in marks):
        return _CUT
    return _OWN

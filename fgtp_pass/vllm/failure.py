"""When ranks fail together: which of them is the cause, said on every rank that is left.

A rank that raises cuts its connections, and the system cuts those of one that dies, so the others
fail at once; one that hangs is given up after `timeout_seconds`, in vLLM's own messages too, whose
limit would be half an hour. A worker waits for workers, an engine for engines. No engine goes on
after an error in a step, so nothing is connected again.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from vllm.distributed.parallel_state import get_dp_group, get_ep_group

from fgtp_pass.agreement.cause import cause_of, is_connection_error, tell
from fgtp_pass.collectives import borrowed_group
from fgtp_pass.collectives.board import Board, BoardLostError
from fgtp_pass.collectives.groups import data_parallel_group
from fgtp_pass.errors import AgreementError

_HEAR_SECONDS = 4.0  # the others may need the store that this process keeps
_PLACE = "vllm"


class Peers:
    """The processes of the other data-parallel ranks that this one waits for.

    waits_on: vLLM's groups on which it does. cut: closes what else they are connected by.
    """

    def __init__(
        self,
        board: Board,
        rank: int,
        size: int,
        timeout: timedelta,
        waits_on: Sequence[dist.ProcessGroup],
        cut: Callable[[], Any] = lambda: None,
    ):
        self._board, self._rank, self._timeout = board, rank, timeout
        self._others = [other for other in range(size) if other != rank]
        self._waits_on, self._cut = waits_on, cut
        for group in waits_on:
            borrowed_group.limit_waits(group, timeout)

    @contextmanager
    def naming_the_cause(self, doing: str) -> Iterator[None]:
        """Within it an error that says that others are away becomes one that says who, and why.

        doing: "in a step". Any other error is told to the others.
        """
        begun = time.monotonic()
        try:
            yield
        except Exception as error:
            waited = time.monotonic() - begun
            tell(self._board, _PLACE, self._rank, error)
            self._cut()
            for group in self._waits_on:
                borrowed_group.cut(group)
            if not is_connection_error(error):
                self._let_others_hear()
                raise
            seconds = self._timeout.total_seconds()
            cause = cause_of(error, self._board, _PLACE, self._others, seconds)
            raise AgreementError(
                f"rank {self._rank} waited {waited:.0f} s {doing}, in vain: {cause}. "
                "This engine ends; start all ranks again.",
                shared=True,
                away=True,
            ) from error

    def _let_others_hear(self) -> None:
        """Wait until the others fail as well, or do something else."""
        keys = [f"{_PLACE}/why/{other}" for other in self._others]
        with contextlib.suppress(BoardLostError):  # whoever kept it has ended: nobody to wait for
            self._board.wait(keys, _HEAR_SECONDS)


def workers(timeout_seconds: float) -> Peers:
    """Those of this worker process."""
    coordinator, experts = get_dp_group(), get_ep_group()
    timeout = timedelta(seconds=timeout_seconds)
    ours = data_parallel_group(coordinator.device_group, timeout)
    stock = [g for c in (coordinator, experts) for g in (c.device_group, c.cpu_group)]
    return Peers(ours.board, ours.rank, ours.size, timeout, stock, lambda: ours.close(ours.size))


class _Engines:
    """Those of the engine in this process. timeout_seconds: None for one without the pass."""

    timeout_seconds: float | None = None

    def __init__(self) -> None:
        self._group: dist.ProcessGroup | None = None
        self._peers: Peers | None = None

    def of(self, group: dist.ProcessGroup) -> Peers | None:
        """group: by which vLLM's engines tell each other whether they have work."""
        if self.timeout_seconds is None:
            return None
        if self._peers is None or group is not self._group:
            timeout = timedelta(seconds=self.timeout_seconds)
            self._peers = Peers(Board(group), group.rank(), group.size(), timeout, [group])
            self._group = group
        return self._peers


ENGINES = _Engines()


def between_engines(stock: Any, *args: Any, **kwargs: Any) -> Any:
    """What a message between engines does, in bounded time. Its group comes first; since 0.33 a
    configuration may come before it.
    """
    group = next((one for one in args if isinstance(one, dist.ProcessGroup)), None)
    peers = ENGINES.of(group) if group is not None else None
    if peers is None:
        return stock(*args, **kwargs)
    with peers.naming_the_cause("for the engines of the other ranks"):
        return stock(*args, **kwargs)

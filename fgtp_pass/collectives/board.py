"""`Board`: what ranks write for each other on the store of torch.distributed, in bounded time.

For what is on no step's path: who has come, who waits for whom, why a rank failed. One process
keeps the store. If it is gone or hangs, so do calls on the store: each is given up after a while.
"""

import pickle
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist

from fgtp_pass.errors import first_line

_PrefixStore: Any = dist.PrefixStore  # type: ignore[attr-defined]

_ANSWER_SECONDS = 5.0  # how long the store may take for one call


class BoardLostError(Exception):
    """The store does not answer."""

    def __init__(self, why: str):
        super().__init__(
            "the store of torch.distributed does not answer, so the process that keeps it (rank 0, "
            f"or the launcher) ended or hangs ({why})"
        )


class Board:
    """Values by key, which all ranks of a process group see. Any number of threads may use it.

    seen: by key, the last value that this rank dealt with.
    """

    def __init__(self, process_group: dist.ProcessGroup):
        shared: Any = process_group.get_group_store()
        try:
            own = shared.clone()  # a connection of its own: others may wait in theirs
        except dist.DistError as error:
            raise BoardLostError(first_line(error)) from error
        except RuntimeError:  # what torch raises for a store that has no such method
            own = shared
        self._shared = shared
        self.seen: dict[str, Any] = {}
        self._store: Any = _PrefixStore("fgtp", own)

    def part(self, key: str) -> Any:
        """A part of the store for someone who takes a store of torch.distributed."""
        return _PrefixStore(f"fgtp/{key}", self._shared)

    def write(self, key: str, value: Any) -> None:
        data = pickle.dumps(value)
        _in_bounded_time(lambda: self._store.set(key, data))

    def erase(self, key: str) -> None:
        _in_bounded_time(lambda: self._store.delete_key(key))

    def read(self, keys: Sequence[str]) -> dict[str, Any]:
        """The values of those keys that there are."""

        def read() -> dict[str, Any]:
            return {
                key: pickle.loads(self._store.get(key)) for key in keys if self._store.check([key])
            }

        found: dict[str, Any] = _in_bounded_time(read)
        return found

    def is_new(self, key: str, value: Any) -> bool:
        return value is not None and self.seen.get(key) != value

    def wait(
        self,
        keys: Sequence[str],
        seconds: float,
        meanwhile: Callable[[float], None] = lambda waited: None,
        counts: Callable[[str, Any], bool] = lambda key, value: True,
    ) -> dict[str, Any]:
        """The values of the keys when all are there, or of those that are after `seconds`.

        meanwhile: is told for how many seconds it has waited. counts: whether a value does.
        """
        found: dict[str, Any] = {}
        start = time.monotonic()
        while True:
            read = self.read([key for key in keys if key not in found])
            found |= {key: value for key, value in read.items() if counts(key, value)}
            waited = time.monotonic() - start
            if len(found) == len(keys) or waited >= seconds:
                return found
            meanwhile(waited)
            # rarely where many wait for long
            time.sleep(min(max(waited / 10, 0.001), 0.2, seconds - waited))


def _in_bounded_time(work: Callable[[], Any]) -> Any:
    """What `work` gives; raises BoardLostError if it fails, or does not end in time."""
    results: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            results.put((work(), None))
        except Exception as error:
            results.put((None, error))

    threading.Thread(target=run, name="fgtp-board", daemon=True).start()
    try:
        value, error = results.get(timeout=_ANSWER_SECONDS)
    except queue.Empty:
        raise BoardLostError(f"no answer in {_ANSWER_SECONDS:g} s") from None
    if error is not None:
        raise BoardLostError(first_line(error)) from error
    return value

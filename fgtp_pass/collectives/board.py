"""`Board`: what ranks write for each other on the store of torch.distributed, in bounded time.

For what is on no step's path: who has come, who waits for whom, why a rank failed. One process
keeps the store. If it is gone or hangs, so do calls on the store: each is given up after a while, a
short one where ranks fail, and the time that they have to meet where they do.
"""

import functools
import pickle
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from fgtp_pass.errors import first_line

_PrefixStore: Any = dist.PrefixStore  # type: ignore[attr-defined]

_ANSWER_SECONDS = 5.0  # how long the store may take for one call, if nothing else is said
_GET_SECONDS = 4.0  # less: a key that was erased just now is no sign of a store that is lost
_THOROUGH_SECONDS = 0.01  # after this, and then after twice as long, keys are read one by one


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
            own.set_timeout(timedelta(seconds=_GET_SECONDS))
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

    def write(self, key: str, value: Any, seconds: float = _ANSWER_SECONDS) -> None:
        """seconds: how long the store may take."""
        data = pickle.dumps(value)
        _in_bounded_time(lambda: self._store.set(key, data), seconds=seconds)

    def write_all(self, values: Mapping[str, Any], seconds: float) -> None:
        """Write values by key, in one request where the store can."""
        keys, data = list(values), [pickle.dumps(value) for value in values.values()]
        if self._store.has_extended_api():
            _in_bounded_time(lambda: self._store.multi_set(keys, data), seconds=seconds)
        else:
            for key, value in values.items():
                self.write(key, value, seconds)

    def erase(self, key: str) -> None:
        _in_bounded_time(lambda: self._store.delete_key(key))

    def read(self, keys: Sequence[str], seconds: float = _ANSWER_SECONDS) -> dict[str, Any]:
        """The values of those keys that there are. Two requests for each.

        seconds: how long the store may take for each.
        """
        calls = (functools.partial(self._values, [key]) for key in keys)
        found = _in_bounded_time(*calls, seconds=seconds)
        return {key: value for one in found for key, value in one.items()}

    def _values(self, keys: Sequence[str]) -> dict[str, Any]:
        """Of all keys, or nothing if one is missing. Two requests where the store can."""
        store = self._store
        if not store.check(list(keys)):
            return {}
        try:
            if len(keys) > 1 and store.has_extended_api():
                data = store.multi_get(list(keys))
            else:
                data = [store.get(key) for key in keys]
        except dist.DistStoreError:  # erased since
            return {}
        return {key: pickle.loads(one) for key, one in zip(keys, data, strict=True)}

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

        meanwhile: is told for how many seconds it has waited. counts: whether a value does. The
        store may take as long for one call.
        """
        found: dict[str, Any] = {}
        start, thorough_at = time.monotonic(), _THOROUGH_SECONDS
        while True:
            waited = time.monotonic() - start
            over = waited >= seconds
            left = [key for key in keys if key not in found]
            patience = max(_ANSWER_SECONDS, seconds - waited)
            if over or waited >= thorough_at:  # who is here now may be gone at the end
                read, thorough_at = self.read(left, patience), 2 * waited
            else:
                together = functools.partial(self._values, left)
                read = _in_bounded_time(together, seconds=patience)[0]
            found |= {key: value for key, value in read.items() if counts(key, value)}
            if over or len(found) == len(keys):
                return found
            meanwhile(waited)
            # rarely where many wait for long
            time.sleep(min(max(waited / 10, 0.001), 0.2, seconds - waited))


def _in_bounded_time(*calls: Callable[[], Any], seconds: float = _ANSWER_SECONDS) -> list[Any]:
    """What the calls give, one after the other; raises BoardLostError if one fails, or does not end
    within `seconds`.
    """
    results: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()

    def run() -> None:
        for call in calls:
            try:
                results.put((call(), None))
            except Exception as error:
                results.put((None, error))
                return

    threading.Thread(target=run, name="fgtp-board", daemon=True).start()
    given = []
    for _ in calls:
        try:
            value, error = results.get(timeout=seconds)
        except queue.Empty:
            raise BoardLostError(f"no answer in {seconds:.3g} s") from None
        if error is not None:
            raise BoardLostError(first_line(error)) from error
        given.append(value)
    return given

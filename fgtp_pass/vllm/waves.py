"""Ranks with an `LLM` each run until none has requests: a wave.

Stock vLLM may end it between two requests of one `generate` or `embed`, if all before have ended
already. A rank that has no further request is gone then, and the other waits for it in vain.
"""

import os
import time
from concurrent.futures import Future
from typing import Any

from vllm.v1.engine import EngineCoreRequestType
from vllm.v1.engine.core_client import SyncMPClient

from fgtp_pass.vllm import failure

_TELL_AGAIN_SECONDS = 1.0


class OneRankClient(SyncMPClient):  # type: ignore[misc]
    """The engine of one data-parallel rank: its wave goes on while requests are being added."""

    _told: float | None = None  # when the engine last heard that more follow

    def add_request(self, request: Any) -> None:
        now = time.monotonic()
        if self._told is None or now - self._told > _TELL_AGAIN_SECONDS:
            self._told = now
            begin_utility(self, fgtp_set_adding.__name__, True)
        super().add_request(request)

    def abort_requests(self, request_ids: list[str]) -> None:
        """Also called for those that were added before one that was refused."""
        super().abort_requests(request_ids)
        if not self.resources.engine_dead:
            self._no_more()

    def get_output(self) -> Any:
        self._no_more()
        return super().get_output()

    def _no_more(self) -> None:
        if self._told is not None:
            self._told = None
            begin_utility(self, fgtp_set_adding.__name__, False)


def run_in_every_step(core: Any) -> None:
    """core: vLLM's EngineCore of one data-parallel rank, within its process.

    A step may run nothing where requests wait, as for a grammar that is being compiled. vLLM's
    engines with a process of their own then run a dummy batch; within a process they do not, and
    the other ranks wait for one.
    """
    stock = core.post_step

    def post_step(model_executed: bool) -> None:
        stock(model_executed)
        if not model_executed:
            core.execute_dummy_batch()

    core.post_step = post_step


def begin_utility(client: SyncMPClient, method: str, *args: Any) -> Future[Any]:
    """Call a method of the client's current engine; the future gives what it returns."""
    call_id, future = int.from_bytes(os.urandom(7)), Future[Any]()
    client.utility_results[call_id] = future
    client._send_input(EngineCoreRequestType.UTILITY, (0, call_id, method, args))
    return future


def fgtp_set_adding(engine: Any, adding: bool) -> None:
    """A utility of the engine's process: whether its client is about to add more requests."""
    engine.fgtp_adding_since = time.monotonic() if adding else None


def has_global_unfinished(stock: Any, engine: Any, local_unfinished: bool) -> bool:
    """What `DPEngineCoreProc._has_global_unfinished_reqs` says, requests to come included.

    A client that stops in the middle is waited for as long as any rank, `timeout_seconds`.
    """
    since, limit = getattr(engine, "fgtp_adding_since", None), failure.ENGINES.timeout_seconds
    more = since is not None and limit is not None and time.monotonic() - since < limit
    unfinished: bool = stock(engine, local_unfinished or more)
    return unfinished

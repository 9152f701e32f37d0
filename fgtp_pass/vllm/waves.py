"""Ranks with an `LLM` each run until none has requests: a wave.

Stock vLLM may end it between two requests of one `generate` or `embed`, if all before have ended
already. A rank that has no further request is gone then, and the other waits for it in vain.
"""

import os
from concurrent.futures import Future
from typing import Any

from vllm.v1.engine import EngineCoreRequestType
from vllm.v1.engine.core_client import SyncMPClient


class OneRankClient(SyncMPClient):  # type: ignore[misc]
    """The engine of one data-parallel rank: its wave goes on while requests are being added."""

    _adding = False

    def add_request(self, request: Any) -> None:
        self._tell(True)
        super().add_request(request)

    def abort_requests(self, request_ids: list[str]) -> None:
        """Also called for those that were added before one that was refused."""
        super().abort_requests(request_ids)
        if not self.resources.engine_dead:
            self._tell(False)

    def get_output(self) -> Any:
        self._tell(False)
        return super().get_output()

    def _tell(self, adding: bool) -> None:
        if adding == self._adding:
            return
        self._adding = adding
        call_id = int.from_bytes(os.urandom(7))
        self.utility_results[call_id] = Future()  # nobody waits for it
        call = (0, call_id, set_adding.__name__, (adding,))
        self._send_input(EngineCoreRequestType.UTILITY, call)


def set_adding(engine: Any, adding: bool) -> None:
    """A utility of the engine's process: whether its client is about to add more requests."""
    engine.fgtp_adding = adding


def has_global_unfinished(stock: Any, engine: Any, local_unfinished: bool) -> bool:
    """What `DPEngineCoreProc._has_global_unfinished_reqs` says, requests to come included."""
    unfinished: bool = stock(engine, local_unfinished or getattr(engine, "fgtp_adding", False))
    return unfinished

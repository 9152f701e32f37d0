"""`LLM(..., data_parallel_size=N)` in one process, for engines that use the pass.

Stock vLLM refuses it: its synchronous client gives every request to the first engine and never
tells the coordinator that the others must run too. `AllRanksClient` does both.
"""

import functools
import itertools
import os
from collections import Counter
from typing import Any
from unittest import mock

import vllm.entrypoints.llm as llm_module
from vllm.v1.engine import EngineCoreRequestType
from vllm.v1.engine.core_client import SyncMPClient

from fgtp_pass.errors import ConfigError
from fgtp_pass.vllm.waves import begin_utility

# An engine at rest takes a request of an earlier wave as the sign to start the next one, and has
# the coordinator wake the other ranks.
_EARLIER_WAVE = -1


def start(stock: Any, llm: Any, *args: Any, data_parallel_size: int, **kwargs: Any) -> None:
    """What `LLM.__init__` does, past its refusal of `data_parallel_size`.

    Raises ConfigError if the engines may not be processes of their own, or this process is told
    to be one of the ranks.
    """
    if int(os.environ.get("VLLM_DP_SIZE", 1)) > 1:
        raise ConfigError(
            f"LLM(data_parallel_size={data_parallel_size}) starts all ranks from one process, and "
            "VLLM_DP_SIZE says that this process is one of them. Leave one of the two out."
        )
    if os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "0":
        raise ConfigError(
            f"LLM(data_parallel_size={data_parallel_size}) starts one process per rank; "
            "VLLM_ENABLE_V1_MULTIPROCESSING=0 forbids that."
        )
    of_all_ranks = functools.partial(llm_module.EngineArgs, data_parallel_size=data_parallel_size)
    with mock.patch.object(llm_module, "EngineArgs", of_all_ranks):
        stock(llm, *args, **kwargs)


class AllRanksClient(SyncMPClient):  # type: ignore[misc]
    """The engines of all data-parallel ranks, each with its share of the requests."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.is_dp = False  # whether engines still run is for the coordinator to know
        self._rank_of: dict[str, int] = {}
        self._unfinished: Counter[int] = Counter()

    def add_request(self, request: Any) -> None:
        """Give the request to the rank that it names, or to the one with the fewest."""
        rank = request.data_parallel_rank
        if rank is None:
            rank = min(range(len(self.core_engines)), key=self._unfinished.__getitem__)
        elif not 0 <= rank < len(self.core_engines):
            raise ValueError(f"there is no data-parallel rank {rank}.")
        self._rank_of[request.request_id] = rank
        self._unfinished[rank] += 1
        request.current_wave = _EARLIER_WAVE
        self._send(rank, EngineCoreRequestType.ADD, request)

    def abort_requests(self, request_ids: list[str]) -> None:
        if self.resources.engine_dead:
            return
        for rank in range(len(self.core_engines)):
            own = [name for name in request_ids if self._rank_of.get(name) == rank]
            if own:
                self._send(rank, EngineCoreRequestType.ABORT, own)
        self._forget(request_ids)

    def get_output(self) -> Any:
        outputs = super().get_output()
        self._forget(outputs.finished_requests or ())
        return outputs

    def call_utility(self, method: str, *args: Any) -> Any:
        """Call it on every rank at once. All ranks' workers answer a collective_rpc; else rank 0's
        answer is the answer.
        """
        answers = []
        for engine in self.core_engines:
            self.core_engine = engine  # where `_send_input` sends to
            answers.append(begin_utility(self, method, *args))
        results = [answer.result() for answer in answers]
        if method == "collective_rpc":
            return list(itertools.chain.from_iterable(results))
        return results[0]

    def _send(self, rank: int, kind: Any, content: Any) -> None:
        self.core_engine = self.core_engines[rank]  # where stock `_send_input` sends to
        self._send_input(kind, content)

    def _forget(self, request_ids: Any) -> None:
        for name in request_ids:
            rank = self._rank_of.pop(name, None)
            if rank is not None:
                self._unfinished[rank] -= 1

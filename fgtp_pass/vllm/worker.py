"""The worker: vLLM's own, which tells the others of its work outside the graph, and takes part in
theirs.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vllm.config import CompilationMode
from vllm.distributed.parallel_state import get_pp_group, get_tp_group
from vllm.platforms import current_platform
from vllm.utils.import_utils import resolve_obj_by_qualname

from fgtp_pass.errors import ConfigError
from fgtp_pass.vllm import failure
from fgtp_pass.vllm.adapters import over_shards, without_adapters
from fgtp_pass.vllm.lockstep import join_host_messages
from fgtp_pass.vllm.settings import read_options
from fgtp_pass.vllm.taking_part import TakingPart
from fgtp_pass.vllm.work import IDLE, STEP

log = logging.getLogger("vllm.fgtp_pass")

STOCK = (
    "vllm.v1.worker.cpu_worker.CPUWorker"
    if current_platform.is_cpu()
    else "vllm.v1.worker.gpu_worker.Worker"
)
QUALIFIED_NAME = "fgtp_pass.vllm.worker.ShardedWorker"

_Stock: Any = resolve_obj_by_qualname(STOCK)


class ShardedWorker(_Stock):  # type: ignore[misc]
    """A rank without requests runs dummy batches, in which others need its shards too."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        join_host_messages()

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        config = self.vllm_config
        options = read_options(config.compilation_config, config.additional_config)
        assert options is not None
        self._peers = failure.workers(options.timeout_seconds)
        with self._peers.naming_the_cause("as it loaded the model"), over_shards():
            super().load_model(*args, **kwargs)
            self._part = TakingPart(self.model_runner, config)

    def _should_warm_up_model(self) -> bool:
        """On CPUs vLLM may leave it out. The graph is then traced in the first step, and vLLM
        keeps no guards: traced by an idle rank's step of one token, it is wrong at all others.
        """
        stock: bool = super()._should_warm_up_model()
        return stock or self.compilation_config.mode != CompilationMode.NONE

    def determine_available_memory(self) -> Any:
        with self._peers.naming_the_cause("as it measured its memory"):
            return super().determine_available_memory()

    def compile_or_warm_up_model(self) -> Any:
        with self._peers.naming_the_cause("as it compiled and warmed up"):
            return super().compile_or_warm_up_model()

    @contextmanager
    def _ending(self, doing: str) -> Iterator[None]:
        """Within it an error ends a worker that the engine does not listen to in a step, and so the
        engine, which would wait for the worker that waits for this one.
        """
        try:
            with self._peers.naming_the_cause(doing):
                yield
        except Exception:
            if get_pp_group().is_last_rank and get_tp_group().is_first_rank:
                raise
            log.exception("This worker ends, and its engine with it.")
            raise SystemExit(1) from None

    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        with self._ending("in a step"):
            STEP.begin(self._part.scheduled.work(scheduler_output))
            return super().execute_model(scheduler_output, *args, **kwargs)

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        with self._ending("in a step"):
            return super().sample_tokens(*args, **kwargs)

    def execute_dummy_batch(self) -> None:
        with self._ending("in an idle step"):
            STEP.begin(IDLE)
            with without_adapters(self.model_runner):
                super().execute_dummy_batch()
            self._part.settle(prompts=True)


def use_sharded_worker(parallel_config: Any) -> None:
    """Let the engine start `ShardedWorker`. Raises ConfigError beside a worker of the user's."""
    if parallel_config.worker_cls not in (STOCK, QUALIFIED_NAME):
        raise ConfigError(
            f'worker_cls is {parallel_config.worker_cls}, but the pass "fgtp" needs a worker of '
            f"its own in the place of {STOCK}. Leave worker_cls out."
        )
    parallel_config.worker_cls = QUALIFIED_NAME

"""The worker: vLLM's own, with a part for idle ranks in what runs outside the graph."""

from typing import Any

from vllm.platforms import current_platform
from vllm.utils.import_utils import resolve_obj_by_qualname

from fgtp_pass.errors import ConfigError
from fgtp_pass.vllm.failure import naming_the_cause
from fgtp_pass.vllm.lockstep import pad_every_step
from fgtp_pass.vllm.logits import take_part

STOCK = (
    "vllm.v1.worker.cpu_worker.CPUWorker"
    if current_platform.is_cpu()
    else "vllm.v1.worker.gpu_worker.Worker"
)
QUALIFIED_NAME = "fgtp_pass.vllm.worker.ShardedWorker"

_Stock: Any = resolve_obj_by_qualname(STOCK)


class ShardedWorker(_Stock):  # type: ignore[misc]
    """A rank without requests runs dummy batches, in which others need its lm_head too."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        pad_every_step()

    def execute_model(self, *args: Any, **kwargs: Any) -> Any:
        with naming_the_cause("a step"):
            return super().execute_model(*args, **kwargs)

    def execute_dummy_batch(self) -> None:
        with naming_the_cause("an idle step"):
            super().execute_dummy_batch()
            config = self.model_config
            take_part(self.model_runner.model, config.get_hidden_size(), config.dtype, self.device)


def use_sharded_worker(parallel_config: Any) -> None:
    """Let the engine start `ShardedWorker`. Raises ConfigError beside a worker of the user's."""
    if parallel_config.worker_cls not in (STOCK, QUALIFIED_NAME):
        raise ConfigError(
            f'worker_cls is {parallel_config.worker_cls}, but the pass "fgtp" needs a worker of '
            f"its own in the place of {STOCK}. Leave worker_cls out."
        )
    parallel_config.worker_cls = QUALIFIED_NAME

"""lm_head under vLLM, which computes logits outside the compiled graph, once per step.

Own -ag-> All x W[out/k] -> Cut -a2a-> Own, with the rows padded to the largest count of the group
in that step. A rank without rows takes part all the same: see `take_part`.
"""

from typing import Any

import torch
import torch.distributed as dist
from vllm.model_executor.layers.logits_processor import LogitsProcessor

from fgtp_pass import collectives
from fgtp_pass.lowering import cut_to_own
from fgtp_pass.vllm.ops import ShardedLayer, run
from fgtp_pass.vllm.sites import current_construction


class Exchange:
    """The lm_head of this process, as its group knows it.

    counts: a gloo group of the component group's ranks, for row counts.
    """

    def __init__(self, sharded: ShardedLayer, counts: dist.ProcessGroup):
        self.sharded = sharded
        self.counts = counts

    def rows_of_group(self, rows: int) -> int:
        """The largest row count of the group. Collective."""
        said = torch.tensor([rows], dtype=torch.int64)
        dist.all_reduce(said, dist.ReduceOp.MAX, group=self.counts)
        return int(said)

    def logits(self, hidden: torch.Tensor, apply_head: Any) -> torch.Tensor:
        """[rows, hidden] -> [rows, vocabulary padded] of this rank's rows. Collective."""
        own, group = hidden.shape[0], self.sharded.group
        rows = self.rows_of_group(own)
        if rows == 0:
            return hidden.new_empty(0, self.sharded.weight.shape[0])
        padded = torch.nn.functional.pad(hidden, (0, 0, 0, rows - own))
        mine = apply_head(collectives.all_gather(run, group, padded))
        whole: torch.Tensor = cut_to_own(run, group, mine, rows, self.sharded.weight)
        return whole[:own]


class ShardedLogitsProcessor(LogitsProcessor):  # type: ignore[misc]
    """Takes an lm_head that is sharded over its component group as one that is not."""

    def __init__(self, *args: Any, **kwargs: Any):
        if current_construction() is None:
            self.__class__ = LogitsProcessor
        LogitsProcessor.__init__(self, *args, **kwargs)

    def _get_logits(
        self,
        hidden_states: torch.Tensor,
        lm_head: Any,
        embedding_bias: torch.Tensor | None,
        skip_gather: bool = False,
    ) -> torch.Tensor | None:
        exchange: Exchange | None = getattr(lm_head, "fgtp_exchange", None)
        if exchange is None:
            stock: torch.Tensor | None = super()._get_logits(
                hidden_states, lm_head, embedding_bias, skip_gather
            )
            return stock
        logits: torch.Tensor | None = exchange.logits(
            hidden_states, lambda x: self._apply_head(lm_head, x, embedding_bias)
        )
        if skip_gather:
            return logits
        beside = lm_head.tp_size > exchange.sharded.group.size  # tensor parallelism
        if beside and hidden_states.shape[0]:  # vLLM's CPU kernel divides by the count of rows
            logits = self._gather_logits(logits)
        return None if logits is None else logits[..., : self.org_vocab_size]


def take_part(model: Any, hidden_size: int, dtype: torch.dtype, device: torch.device) -> None:
    """What a rank does in a step in which it has no rows of its own. Collective.

    Through `compute_logits`, so that its shard does to the others' rows what theirs do.
    """
    if any(hasattr(layer, "fgtp_exchange") for layer in model.modules()):
        model.compute_logits(torch.zeros(0, hidden_size, dtype=dtype, device=device))

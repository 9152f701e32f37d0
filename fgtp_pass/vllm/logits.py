"""lm_head under vLLM, which computes logits outside the compiled graph.

Own -ag-> All x W[out/k] -> Cut -a2a-> Own, at the largest row count of the group in that call,
which all know from the step's message. A rank without rows takes part too: see `take_part`.
"""

from typing import Any

import torch
from vllm.model_executor.layers.logits_processor import LogitsProcessor

from fgtp_pass.collectives import functional
from fgtp_pass.rewrite.moves import cut_to_own
from fgtp_pass.vllm.marker_ops import ShardedLayer, run
from fgtp_pass.vllm.meta_plan import current_construction
from fgtp_pass.vllm.work import Calls, rows_for_all


class Exchange:
    """The lm_head of this process, as its group knows it."""

    def __init__(self, sharded: ShardedLayer):
        self.sharded = sharded
        self.calls = Calls(sharded.group)

    def logits(self, hidden: torch.Tensor, apply_head: Any, drafts: bool) -> torch.Tensor:
        """[rows, hidden] -> [rows, vocabulary padded] of this rank's rows. Collective."""
        own, group = hidden.shape[0], self.sharded.group
        rows = rows_for_all(own, self._most(drafts), "its lm_head")
        if not drafts:
            self.calls.count()
        if rows == 0:
            return hidden.new_empty(0, self.sharded.weight.shape[0])
        padded = torch.nn.functional.pad(hidden, (0, 0, 0, rows - own))
        mine = apply_head(functional.all_gather(run, group, padded))
        whole: list[torch.Tensor] = cut_to_own(run, group, [mine], rows, [self.sharded.weight])
        return whole[0][:own]

    def _most(self, drafts: bool) -> int | None:
        work = self.calls.work
        if work is None:
            return None
        if drafts:
            return work.requests
        if self.calls.made == 0:
            return work.logit_rows
        return work.prompt_rows if self.calls.made <= work.prompt_calls else 0

    def owed(self, prompts: bool) -> int:
        """How many calls are left for this rank to take part in; prompts: those, too."""
        work = self.calls.work
        if work is None:
            return 0
        return 1 + (work.prompt_calls if prompts else 0) - self.calls.made


class ShardedLogitsProcessor(LogitsProcessor):  # type: ignore[misc]
    """Takes an lm_head that is sharded over its component group as one that is not."""

    def __init__(self, *args: Any, **kwargs: Any):
        construction = current_construction()
        if construction is None:
            self.__class__ = LogitsProcessor
        LogitsProcessor.__init__(self, *args, **kwargs)
        self.fgtp_drafts = construction is not None and construction.drafts

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
            hidden_states,
            lambda x: self._apply_head(lm_head, x, embedding_bias),
            self.fgtp_drafts,
        )
        if skip_gather:
            return logits
        beside = lm_head.tp_size > exchange.sharded.group.size  # tensor parallelism
        if beside and hidden_states.shape[0]:  # vLLM's CPU kernel divides by the count of rows
            logits = self._gather_logits(logits)
        return None if logits is None else logits[..., : self.org_vocab_size]

    def get_top_tokens(
        self,
        lm_head: Any,
        hidden_states: torch.Tensor,
        embedding_bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[rows] ids. A drafter's way past whole logits; it must not end at this rank's shard."""
        if not hasattr(lm_head, "fgtp_exchange"):
            stock: torch.Tensor = super().get_top_tokens(lm_head, hidden_states, embedding_bias)
            return stock
        logits: torch.Tensor = self(lm_head, hidden_states, embedding_bias)
        return logits.argmax(dim=-1)


def exchange_of(model: Any) -> Exchange | None:
    """That of the sharded lm_head in the model, if it has one."""
    found = (getattr(layer, "fgtp_exchange", None) for layer in model.modules())
    return next((exchange for exchange in found if exchange is not None), None)


def take_part(model: Any, hidden_size: int, dtype: torch.dtype, device: torch.device) -> None:
    """Call the lm_head without rows of this rank's own. Collective.

    Through `compute_logits`, so that its shard does to the others' rows what theirs do.
    """
    model.compute_logits(torch.zeros(0, hidden_size, dtype=dtype, device=device))

"""Where, in a step of a model runner, a rank takes part in what others do outside the graph.

Collectives of a step must come in one order on all ranks. Both runners compute logits of samples
first. V1 then drafts and computes logits of prompts, or the other way round where drafts are made
from tokens on the host; V2 computes logits of prompts, then drafts. An idle rank's dummy batch runs
the model and the drafter only, so the rest is added to it here.
"""

import functools
from typing import Any
from unittest import mock

import torch
from torch import nn

from fgtp_pass.vllm import host
from fgtp_pass.vllm.born_sharded import ShardedVocabParallelEmbedding
from fgtp_pass.vllm.logits import exchange_of, take_part
from fgtp_pass.vllm.settings import embeds_outside
from fgtp_pass.vllm.stages import is_first_stage
from fgtp_pass.vllm.work import STEP, Scheduled


class TakingPart:
    """The part of one worker, whose model is loaded.

    scheduled: knows what this rank is about to do.
    """

    def __init__(self, runner: Any, config: Any):
        self._runner = runner
        self._model_config = config.model_config
        self._exchange = exchange_of(runner.model)
        v2 = config.use_v2_model_runner
        embeds = embeds_outside(config.model_config) and is_first_stage()
        self._lookups = _read_outside(runner.model, runner.device) if embeds else []
        STEP.lookups = [layer.take_part for layer in self._lookups]
        sampled = runner.model_state.num_new_sampled_tokens_per_step if v2 else 1
        self.scheduled = Scheduled(v2, sampled, embeds, host.prompt_chunk() if v2 else 0)
        if v2:
            self._join_v2()
        else:
            self._join_v1(config.speculative_config)

    def settle(self, prompts: bool) -> None:
        """Take part in what is left of this step: logits of samples; prompts: of these, too."""
        if self._exchange is None:
            return
        config = self._model_config
        for _ in range(self._exchange.owed(prompts)):
            take_part(
                self._runner.model, config.get_hidden_size(), config.dtype, self._runner.device
            )

    def _join_v1(self, speculative: Any) -> None:
        runner = self._runner
        _after(runner, "_get_prompt_logprobs_dict", lambda: self.settle(prompts=True))
        for layer in self._lookups:  # a batch of prompt embeddings may have no ids at all
            _after(runner, "_preprocess", layer.take_part)
        drafter: Any = getattr(runner, "drafter", None)
        model = getattr(drafter, "model", None)
        if not isinstance(model, nn.Module):
            return
        drafts_last = speculative.disable_padded_drafter_batch
        stock = drafter.dummy_run

        @functools.wraps(stock)
        def dummy_run(*args: Any, **kwargs: Any) -> None:
            self.settle(prompts=drafts_last)
            if not STEP.agreed or exchange_of(model) is None:
                stock(*args, **kwargs)
                return

            def draft(*inputs: Any, **named: Any) -> Any:
                out = model(*inputs, **named)
                take_part(model, drafter.hidden_size, drafter.dtype, drafter.device)
                return out

            with mock.patch.object(drafter, "model", draft):
                stock(*args, **kwargs)

        drafter.dummy_run = dummy_run

    def _join_v2(self) -> None:
        runner = self._runner
        stock = runner.execute_model

        @functools.wraps(stock)
        def execute_model(*args: Any, dummy_run: bool = False, **kwargs: Any) -> Any:
            out = stock(*args, dummy_run=dummy_run, **kwargs)
            if dummy_run:  # before the drafter's
                self.settle(prompts=True)
            return out

        runner.execute_model = execute_model
        speculator: Any = getattr(runner, "speculator", None)
        if isinstance(speculator, host.resolve(host.STANDALONE_DRAFTER)):
            _alone(speculator)
        prompts = getattr(runner, "prompt_logprobs_worker", None)
        if prompts is not None:
            _after(prompts, "compute_prompt_token_id_logprobs", lambda: self.settle(prompts=True))


def _read_outside(model: Any, device: torch.device) -> list[ShardedVocabParallelEmbedding]:
    """The sharded tables that a runner reads before it calls the model, in the order in which it
    does: a model may have more than one, and others that its graph reads. Collective.
    """
    read: list[ShardedVocabParallelEmbedding] = []
    tables = [m for m in model.modules() if type(m) is ShardedVocabParallelEmbedding]
    hooks = [table.register_forward_pre_hook(lambda m, _ids: read.append(m)) for table in tables]
    with torch.inference_mode():
        model.embed_input_ids(torch.zeros(1, dtype=torch.int32, device=device))
    for hook in hooks:
        hook.remove()
    return read


def _alone(speculator: Any) -> None:
    """Let the V2 runner's draft model, which is whole on each rank, run at this rank's counts: it
    is handed those of the target's step, which are of other tokens than its own.
    """
    stock = speculator._run_model

    @functools.wraps(stock)
    def run_model(ids: Any, positions: Any, attention: Any, slots: Any, counts: Any) -> Any:
        own = None if counts is None else torch.full_like(counts, ids.shape[0])
        return stock(ids, positions, attention, slots, own)

    speculator._run_model = run_model


def _after(owner: Any, name: str, then: Any) -> None:
    stock = getattr(owner, name)

    @functools.wraps(stock)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        out = stock(*args, **kwargs)
        then()
        return out

    setattr(owner, name, wrapped)

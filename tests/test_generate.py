"""Hugging Face's generate() on ranks whose sequences end at different times."""

from typing import Any

import torch
import torch.distributed as dist
import zoo
from checkpoints import options
from decoding import prompts
from ranks import Pools

import fgtp_pass
from fgtp_pass import fgtp_backend

NEW = 14


def _generate() -> tuple[int, int]:
    """Both recipes of docs/loading.md give the tokens of the unsharded model."""
    rank = dist.get_rank()
    model = zoo.build("llama")
    ids = prompts(rank, 1, 5 + 3 * rank, model.config.vocab_size)
    given: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    free = model.generate(ids, **given)[0, ids.shape[1] :].tolist()
    # a token that ends this rank's sequence early on rank 0 and late on rank 1
    given["eos_token_id"] = free[3 if rank == 0 else 9]
    want = model.generate(ids, **given)
    model.compile(backend=fgtp_backend, options=options(tokens="ragged"))
    assert torch.equal(model.generate(ids, synced_gpus=True, **given)[:, : want.shape[1]], want)
    assert torch.equal(model.generate(ids, **given), want)
    idled = 0
    while fgtp_pass.idle_step(model):
        idled += 1
    return want.shape[1] - ids.shape[1], idled


def test_generate_where_sequences_end_at_different_times(ranks: Pools) -> None:
    (short, idled), (long, none) = ranks(2).run(_generate)
    assert short < long <= NEW
    assert none == 0
    assert idled == long - short


def _synced_equal() -> None:
    """With one length and batch everywhere, tokens="equal" does."""
    model = zoo.build("gpt2")
    rank = dist.get_rank()
    ids = prompts(rank, 2, 5, model.config.vocab_size)
    given: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    given["eos_token_id"] = model.generate(ids, **given)[0, 6 + rank].item()
    want = model.generate(ids, **given)
    model.compile(backend=fgtp_backend, options=options())
    assert torch.equal(model.generate(ids, synced_gpus=True, **given)[:, : want.shape[1]], want)


def test_generate_with_equal_batches_and_synced_gpus(ranks: Pools) -> None:
    ranks(2).run(_synced_equal)

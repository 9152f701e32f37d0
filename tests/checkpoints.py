"""Checkpoints of tiny models for tests, and models that are loaded from them."""

from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import zoo
from decoding import prompts, sizes
from torch import nn
from transformers import AutoModelForCausalLM

import fgtp_pass
from fgtp_pass import fgtp_backend
from fgtp_pass.checkpoint import load
from fgtp_pass.checkpoint.files import Checkpoint


def options(k: int = 2, **given: Any) -> dict[str, Any]:
    """Of the backend; mixtral has no dense FFN."""
    asked = {"finegrained_tp_config": sizes(k), "allow_missing": ["mlp"]}
    return {**asked, "inner_backend": "eager", **given}


def call(config: Any, length: int = 6) -> dict[str, Any]:
    """One call of a model, with this rank's own tokens."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    return {"input_ids": prompts(rank, 2, length, config.vocab_size), "use_cache": False}


def empty(name: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    """The model of an architecture without weights."""
    with fgtp_pass.init_empty_weights():
        made: Any = AutoModelForCausalLM.from_config(zoo.config(name, **overrides), dtype=dtype)
    return made.eval()


def loaded(model: Any, folder: str | Path, k: int = 2, **given: Any) -> tuple[Any, Checkpoint]:
    """A model read from a folder, and what was read of that."""
    opened: list[Checkpoint] = []
    real = load.open_checkpoint

    def watched(path: Path) -> Checkpoint:
        opened.append(real(path))
        return opened[0]

    given = {"options": options(k), "kwargs": call(model.config), **given}
    with mock.patch.object(load, "open_checkpoint", watched):
        model = fgtp_pass.load_checkpoint(model, folder, **given)
    return model, opened[0]


def from_pretrained(folder: str | Path, dtype: torch.dtype = torch.float32, k: int = 2) -> Any:
    """The same as every rank had it before: read as a whole, then compiled."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    model.compile(backend=fgtp_backend, options=options(k))
    return model


@torch.no_grad()
def logits(model: Any, length: int = 6) -> torch.Tensor:
    return model(**call(model.config, length)).logits


def kept_bytes(model: nn.Module) -> int:
    """What this rank holds of the weights: parameters and persistent buffers, a tied one once."""
    state = fgtp_pass.shard_state_dict(model)
    return sum(t.nbytes for t in {id(tensor): tensor for tensor in state.values()}.values())


def assert_same_weights(model: nn.Module, want: dict[str, torch.Tensor]) -> None:
    """Bit for bit, with the same names and dtypes. Collective."""
    full = fgtp_pass.full_state_dict(model)
    assert full.keys() == want.keys()
    for name, tensor in want.items():
        assert full[name].dtype is tensor.dtype, name
        assert torch.equal(full[name], tensor), name

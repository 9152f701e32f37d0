"""New weights for a model that is serving, as a trainer sends them in reinforcement learning.

    python examples/weight_sync.py

Two ranks generate with a sharded model. After each round rank 0 has trained a step further and
sends its weights, one tensor at a time; each rank keeps its part, in place. A round whose weights
break off in the middle changes nothing, on neither rank.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import two_ranks
from transformers import LlamaConfig, LlamaForCausalLM

import fgtp_pass
from fgtp_pass import fgtp_backend

CONFIG = LlamaConfig(
    hidden_size=64,
    intermediate_size=144,
    num_hidden_layers=2,
    num_attention_heads=4,
    vocab_size=160,
    initializer_range=0.2,
    bos_token_id=None,
    eos_token_id=None,
)
ROUNDS = 3


def main() -> None:
    for rank, said in enumerate(two_ranks.run(rank_main, timeout=180)):
        for line in said:
            print(f"rank {rank}: {line}")


def trainer(step: int) -> LlamaForCausalLM:
    """What a trainer has after some steps; here only another seed."""
    torch.manual_seed(step)
    return LlamaForCausalLM(CONFIG).eval()


def one_by_one(model: LlamaForCausalLM, until: int | None = None) -> Iterator[Any]:
    """The trainer's weights; with `until`, it goes down after that many."""
    for number, (name, parameter) in enumerate(model.named_parameters()):
        if number == until:
            raise RuntimeError("the trainer went down")
        yield name, parameter.detach()


@torch.no_grad()
def rank_main() -> list[str]:
    rank = dist.get_rank()
    prompt = torch.arange(6).view(1, 6) + 10 * rank
    serving = trainer(0)
    serving.compile(backend=fgtp_backend, options={"inner_backend": "eager"})
    said = []
    for step in range(ROUNDS):
        if step:
            new = one_by_one(trainer(step)) if rank == 0 else None
            fgtp_pass.update_weights(serving, new, source="rank0")
        got = serving.generate(prompt, max_new_tokens=8, do_sample=False)
        want = trainer(step).generate(prompt, max_new_tokens=8, do_sample=False)
        said.append(f"round {step}: tokens as of the trainer's model: {torch.equal(got, want)}")
    broken = one_by_one(trainer(ROUNDS), until=9) if rank == 0 else None
    try:
        fgtp_pass.update_weights(serving, broken, source="rank0")
    except (RuntimeError, fgtp_pass.AgreementError) as error:
        said.append(f"round {ROUNDS}: {str(error).splitlines()[0]}")
    again = serving.generate(prompt, max_new_tokens=8, do_sample=False)
    said.append(f"tokens as of round {ROUNDS - 1}: {torch.equal(again, got)}")
    return said


if __name__ == "__main__":
    main()

"""Ranks with requests of their own: other lengths, other batch sizes, at times none at all.

    python examples/ragged_serving.py

With tokens="ragged" the ranks of a group exchange their token counts before each step, and each
site pads to the largest. All ranks keep the same beat: on every tick a rank runs one step of the
compiled model, or fgtp_pass.idle_step(fast) if it has nothing to do.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import two_ranks
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import fgtp_pass
from fgtp_pass import fgtp_backend

VOCABULARY = 160


@dataclass(frozen=True)
class Request:
    """A batch of prompts [batch, length] that arrives at a tick and wants `steps` tokens."""

    tick: int
    batch: int
    length: int
    steps: int

    def prompts(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(100 * self.length + self.batch)
        return torch.randint(0, VOCABULARY, (self.batch, self.length), generator=generator)


# by rank; each rank's requests do not overlap
REQUESTS = (
    (Request(tick=0, batch=2, length=5, steps=6), Request(tick=8, batch=3, length=4, steps=4)),
    (Request(tick=0, batch=3, length=9, steps=3), Request(tick=10, batch=2, length=12, steps=4)),
)
TICKS = 14


class Running:
    """A request that is being decoded, one step at a time."""

    def __init__(self, model: Any, request: Request, config: LlamaConfig):
        self.model, self.left = model, request.steps
        self.fed = request.prompts()
        self.cache = DynamicCache(config=config)
        self.tokens: list[torch.Tensor] = []

    def step(self) -> None:
        out = self.model(
            input_ids=self.fed, past_key_values=self.cache, use_cache=True, logits_to_keep=1
        )
        self.fed = out.logits[:, -1].argmax(-1, keepdim=True)
        self.tokens.append(self.fed[:, 0])
        self.left -= 1


def build() -> nn.Module:
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=144,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=VOCABULARY,
        initializer_range=0.2,
    )
    torch.manual_seed(0)  # every rank has the same weights
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def rank_main() -> tuple[int, int, bool]:
    """Serve this rank's requests; (steps run, steps idled, whether all tokens are right)."""
    model = build()
    requests = REQUESTS[dist.get_rank()]
    want = []
    for request in requests:
        alone = Running(model, request, model.config)
        while alone.left:
            alone.step()
        want.append(torch.stack(alone.tokens))

    fast = torch.compile(
        model,
        backend=fgtp_backend,
        options={
            "tokens": "ragged",
            "inner_backend": "eager",  # a toy model is not worth a compile
        },
    )
    waiting = list(requests)
    running: Running | None = None
    got, steps, idled = [], 0, 0
    for tick in range(TICKS):
        if running is None and waiting and waiting[0].tick <= tick:
            running = Running(fast, waiting.pop(0), model.config)
        if running is None:
            fgtp_pass.idle_step(fast)
            idled += 1
            continue
        running.step()
        steps += 1
        if running.left == 0:
            got.append(torch.stack(running.tokens))
            running = None
    same = len(got) == len(want) and all(map(torch.equal, got, want))
    return steps, idled, same


def main() -> None:
    results = two_ranks.run(rank_main, timeout=600)
    for rank, (steps, idled, same) in enumerate(results):
        print(f"rank {rank}: {steps} steps, {idled} idle, tokens as unsharded: {same}")
    if not all(same for _, _, same in results):
        raise SystemExit("the sharded model gave other tokens than the unsharded one.")


if __name__ == "__main__":
    main()

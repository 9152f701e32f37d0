"""A model in shards from disk to memory, and back.

    python examples/load_shards.py

Two ranks read their shards straight from a checkpoint, save them, and read them again. Neither ever
holds the whole model, as the highest memory of each says.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import two_ranks
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import fgtp_pass

CONFIG = LlamaConfig(
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=4,
    num_attention_heads=12,
    num_key_value_heads=4,
    vocab_size=32000,
)
MIB = 2**20


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        model = LlamaForCausalLM(CONFIG)
        model.save_pretrained(folder)
        size = sum(p.nbytes for p in model.parameters())
        del model
        print(f"the model has {size / MIB:.0f} MiB")
        for rank, said in enumerate(two_ranks.run(rank_main, folder, timeout=280)):
            print(f"rank {rank}: {said}")


def rank_main(folder: str) -> str:
    before = peak()
    model = load(folder)
    took = peak() - before
    ids = torch.arange(8).view(1, 8) + dist.get_rank()
    with torch.no_grad():
        first = model(input_ids=ids, use_cache=False).logits
    kept = sum(part.nbytes for part in fgtp_pass.shard_state_dict(model).values())
    said = [
        f"its shards and what stays whole have {kept / MIB:.0f} MiB",
        f"loading, imports and compiling included, took {took / MIB:.0f} MiB",
    ]
    shards = str(Path(folder) / "shards")
    fgtp_pass.save_checkpoint(model, shards)
    del model
    torch._dynamo.reset()
    model = load(shards)
    with torch.no_grad():
        again = model(input_ids=ids, use_cache=False).logits
    said.append(f"saved and loaded again, same logits: {torch.equal(first, again)}")
    return ", ".join(said)


def load(path: str) -> Any:
    """The model, empty, and then the part of it that this rank keeps."""
    with fgtp_pass.init_empty_weights():
        model = AutoModelForCausalLM.from_config(CONFIG, dtype=torch.float32).eval()
    return fgtp_pass.load_checkpoint(
        model,
        path,
        kwargs={"input_ids": torch.ones(1, 8, dtype=torch.long), "use_cache": False},
        options={"inner_backend": "eager"},  # a toy model is not worth a compile
    )


def peak() -> int:
    """The most memory that this process has had so far, in bytes; 0 where there is no /proc."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024


if __name__ == "__main__":
    main()

"""Tiny checkpoints with random weights, of sizes that vLLM's CPU kernels take."""

import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zoo

_COMMON: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "vocab_size": 512,
    "max_position_embeddings": 256,
}
_GQA: dict[str, Any] = _COMMON | {"num_key_value_heads": 2, "head_dim": 32}


@dataclass(frozen=True)
class Checkpoint:
    """A model of the zoo, what its configuration changes, and what vLLM needs to run it on a CPU.

    saved: on top of the configuration as transformers writes it.
    """

    name: str
    overrides: dict[str, Any]
    saved: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> str:
        model = zoo.build(self.name, **self.overrides)
        model.save_pretrained(folder)
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | self.saved))
        return str(folder)


_EXPERTS = {"enable_expert_parallel": True, "enforce_eager": True}

CHECKPOINTS: dict[str, Checkpoint] = {
    "llama": Checkpoint("llama", _GQA),
    "qwen3": Checkpoint("qwen3", _GQA | {"tie_word_embeddings": True}),
    "qwen2": Checkpoint("qwen2", _COMMON | {"num_key_value_heads": 2}),
    "gemma3": Checkpoint("gemma3", _GQA | {"query_pre_attn_scalar": 32}),
    "mixtral": Checkpoint("mixtral", _GQA, options=_EXPERTS),
    "qwen3_moe": Checkpoint(
        "qwen3_moe", _GQA | {"num_experts": 4, "moe_intermediate_size": 64}, options=_EXPERTS
    ),
    "deepseek_v3": Checkpoint(
        "deepseek_v3",
        _COMMON
        | {"num_key_value_heads": 4, "moe_intermediate_size": 64}
        | {"kv_lora_rank": 512, "qk_nope_head_dim": 32, "qk_rope_head_dim": 64}
        | {"v_head_dim": 32, "q_lora_rank": 48},
        saved={"topk_method": "noaux_tc"},
        options=_EXPERTS,
    ),
}


class Checkpoints:
    """Writes each checkpoint once, when it is first asked for."""

    def __init__(self, folder: Path):
        self._folder = folder

    def __call__(self, name: str) -> str:
        folder = self._folder / name
        return str(folder) if folder.exists() else CHECKPOINTS[name].write(folder)


def prompts(count: int = 7, longest: int = 40) -> dict[int, list[int]]:
    """By number, token ids of different lengths."""
    source = random.Random(0)
    return {
        i: [source.randrange(1, 500) for _ in range(source.randrange(3, longest))]
        for i in range(count)
    }

"""Adapters with random pairs A and B for a checkpoint, as PEFT saves them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FFN = ("gate_proj", "up_proj", "down_proj")
VOCABULARY = ("embed_tokens", "lm_head")


def write_adapter(folder: Path, model: str, seed: int, rank: int, modules: Iterable[str]) -> str:
    """B A is about half as large as the weight it is added to, once it is scaled by two."""
    source = torch.Generator().manual_seed(seed)
    targets, tensors = list(modules), dict[str, torch.Tensor]()
    with safe_open(Path(model) / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118, it is no dictionary
            module, _, kind = name.rpartition(".")
            if kind != "weight" or module.rpartition(".")[2] not in targets:
                continue
            weight = file.get_tensor(name)
            size = float((weight.std() / 4 / rank**0.5).sqrt())
            outputs, inputs = weight.shape
            if "embed_tokens" in module:
                outputs, inputs = inputs, outputs
                a, b = "lora_embedding_A", "lora_embedding_B"
            else:
                a, b = "lora_A.weight", "lora_B.weight"
            for which, shape in ((a, (rank, inputs)), (b, (outputs, rank))):
                pair = size * torch.randn(*shape, generator=source)
                tensors[f"base_model.model.{module}.{which}"] = pair
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"bias": "none"}))
    return str(folder)

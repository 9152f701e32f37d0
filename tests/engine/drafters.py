"""Drafters with random weights for the checkpoints of `checkpoints`, as vLLM loads them."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


def _random(source: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=source) * 0.08


def _config(target: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((Path(target) / "config.json").read_text())
    return config


def _write(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def _layer(config: dict[str, Any], source: torch.Generator, name: str, read: int) -> dict[str, Any]:
    """A decoder layer of Llama. read: features that its attention reads."""
    hidden, inner, head = (config[k] for k in ("hidden_size", "intermediate_size", "head_dim"))
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes = {"self_attn.q_proj": (queries, read), "self_attn.o_proj": (hidden, queries)}
    shapes |= {f"self_attn.{kv}_proj": (keys, read) for kv in "kv"}
    shapes |= {f"mlp.{up}_proj": (inner, hidden) for up in ("gate", "up")}
    shapes |= {"mlp.down_proj": (hidden, inner)}
    tensors = {f"{name}.{key}.weight": _random(source, *shape) for key, shape in shapes.items()}
    return tensors | {f"{name}.post_attention_layernorm.weight": torch.ones(hidden)}


def write_eagle(target: str, folder: Path) -> str:
    """One layer; embedding and lm_head are the target's."""
    source, config = torch.Generator().manual_seed(1), _config(target)
    hidden = config["hidden_size"]
    config |= {"architectures": ["EagleLlamaForCausalLM"], "num_hidden_layers": 1}
    layer = _layer(config, source, "layers.0", hidden)
    return _write(folder, config, {"fc.weight": _random(source, hidden, 2 * hidden)} | layer)


def write_eagle3(target: str, folder: Path) -> str:
    """One layer that reads two of the target's, and an lm_head for half of the vocabulary."""
    source, config = torch.Generator().manual_seed(2), _config(target)
    hidden, words = config["hidden_size"], config["vocab_size"] // 2
    config |= {"architectures": ["Eagle3LlamaForCausalLM"], "num_hidden_layers": 1}
    read = {"eagle_aux_hidden_state_layer_ids": [0, 1]}
    config |= {"draft_vocab_size": words, "eagle_config": read} | read
    tensors = {"fc.weight": _random(source, hidden, 2 * hidden)}
    tensors |= _layer(config, source, "midlayer", 2 * hidden)
    tensors |= {
        f"midlayer.{n}.weight": torch.ones(hidden) for n in ("hidden_norm", "input_layernorm")
    }
    tensors |= {"norm.weight": torch.ones(hidden), "lm_head.weight": _random(source, words, hidden)}
    tensors |= {"d2t": torch.arange(words)}  # every other word: i + d2t[i]
    return _write(folder, config, tensors)


def write_mtp(target: str, folder: Path) -> str:
    """The target with one layer more, which predicts the token after the next."""
    shutil.copytree(target, folder)
    source, config = torch.Generator().manual_seed(3), _config(target)
    hidden, last = config["hidden_size"], config["num_hidden_layers"] - 1
    path = folder / "model.safetensors"
    tensors = load_file(path)
    before, name = f"model.layers.{last}.", f"model.layers.{last + 1}."
    for key, value in list(tensors.items()):
        if key.startswith(before):
            random = value.dim() > 1
            tensors[name + key.removeprefix(before)] = (
                _random(source, *value.shape) if random else value.clone()
            )
    tensors |= {f"{name}{norm}.weight": torch.ones(hidden) for norm in ("enorm", "hnorm")}
    tensors |= {f"{name}eh_proj.weight": _random(source, hidden, 2 * hidden)}
    tensors |= {f"{name}shared_head.norm.weight": torch.ones(hidden)}
    save_file(tensors, path, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    return str(folder)

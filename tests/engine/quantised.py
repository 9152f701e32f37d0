"""Quantised checkpoints, made by hand from a checkpoint of transformers."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

_WEIGHTS: dict[str, Any] = {"type": "int", "symmetric": True, "dynamic": False}
_INT8 = {
    "weights": _WEIGHTS | {"num_bits": 8, "strategy": "channel"},
    "input_activations": _WEIGHTS | {"num_bits": 8, "strategy": "token", "dynamic": True},
}
_GROUP = 32  # inputs that share a scale
_INT4 = {"weights": _WEIGHTS | {"num_bits": 4, "strategy": "group", "group_size": _GROUP}}


def write_int8(source: str, folder: Path) -> str:
    """W8A8: int8 weights with one scale per output, activations quantised per token."""

    def quantise(weight: torch.Tensor) -> dict[str, torch.Tensor]:
        scale = weight.abs().amax(dim=1, keepdim=True) / 127
        return {"weight": torch.round(weight / scale).to(torch.int8), "weight_scale": scale}

    return _write(source, folder, quantise, "int-quantized", _INT8)


def write_int4(source: str, folder: Path) -> str:
    """W4A16: eight int4 weights in an int32, one scale per output and group of inputs."""

    def quantise(weight: torch.Tensor) -> dict[str, torch.Tensor]:
        outputs, inputs = weight.shape
        grouped = weight.view(outputs, inputs // _GROUP, _GROUP)
        scale = grouped.abs().amax(dim=2) / 7
        values = torch.round(grouped / scale[..., None]).view(outputs, inputs // 8, 8) + 8
        shifts = torch.arange(0, 32, 4)
        packed = (values.to(torch.int64) << shifts).sum(dim=2)
        packed = torch.where(packed >= 1 << 31, packed - (1 << 32), packed)
        return {
            "weight_packed": packed.to(torch.int32),
            "weight_scale": scale.to(torch.bfloat16),
            "weight_shape": torch.tensor([outputs, inputs]),
        }

    return _write(source, folder, quantise, "pack-quantized", _INT4)


def _write(
    source: str,
    folder: Path,
    quantise: Callable[[torch.Tensor], dict[str, torch.Tensor]],
    layout: str,
    scheme: dict[str, Any],
) -> str:
    """A compressed-tensors checkpoint of `source`; lm_head and routed experts stay as they are."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [n for n in tensors if n.endswith("_proj.weight") and ".experts." not in n]:
        found = quantise(tensors.pop(name))
        tensors |= {name.removesuffix("weight") + key: value for key, value in found.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    quantization = {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"]} | scheme},
        "ignore": ["lm_head", "re:.*mlp.experts.*"],
    }
    config = folder / "config.json"
    given = json.loads(config.read_text())
    config.write_text(json.dumps(given | {"quantization_config": quantization}))
    return str(folder)

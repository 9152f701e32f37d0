"""What is needed of transformers beyond its public interface, in one place; checked with 5.19.

`core_model_loading` and `conversion_mapping` turn the names and tensors of a checkpoint into those
of a model (experts that are fused, heads that are renamed) and back; here on lazy tensors.
`_is_hf_initialized` is how `initialize_weights` knows what it must not touch.
"""

import re
import sys
from collections.abc import Iterable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fgtp_pass.checkpoint.lazy_tensor import RememberOps
from fgtp_pass.errors import CheckpointError


def is_pretrained_model(model: nn.Module) -> bool:
    """Whether it is a model of transformers, which is imported if it is."""
    loaded = sys.modules.get("transformers.modeling_utils")
    return loaded is not None and isinstance(model, loaded.PreTrainedModel)


def to_model(model: Any, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A checkpoint's lazy tensors under the model's names, converted as `from_pretrained` does.

    What the model has no name for stays under its own.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    known, base = model.state_dict(keep_vars=True), model.base_model_prefix
    found: dict[str, torch.Tensor] = {}
    converted: dict[str, Any] = {}
    for name in sorted(tensors, key=dot_natural_key):
        renamed, pattern = rename_source_key(name, renamings, converters, base, known)
        if renamed not in known and name in known:
            renamed, pattern = rename_source_key(name, [], [], base, known)
        if pattern is None or renamed not in known:
            found[renamed if renamed in known else name] = tensors[name]
            continue
        converter = converted.setdefault(renamed, deepcopy(by_pattern[pattern]))
        converter.add_tensor(renamed, name, pattern, tensors[name])
    with RememberOps():
        for name, converter in converted.items():
            found |= _convert(converter, name, model)
    return found


def to_checkpoint(model: Any, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The model's tensors, lazy, under the names that `save_pretrained` writes."""
    from transformers.core_model_loading import revert_weight_conversion

    with RememberOps():
        return dict(revert_weight_conversion(model, dict(tensors)))


def _convert(converter: Any, name: str, model: Any) -> dict[str, torch.Tensor]:
    try:
        made = converter.convert(name, model=model, config=model.config)
    except Exception as error:  # of transformers' ops, which raise whatever torch does
        raise CheckpointError(
            f"{name} cannot be made of the checkpoint's {', '.join(converter.source_patterns)}, as "
            f"transformers does: {error}"
        ) from error
    return {n: value[0] if isinstance(value, list) else value for n, value in made.items()}


def save_config(model: nn.Module, folder: Path) -> None:
    """Write the configuration of a model of transformers; of another nothing."""
    if not is_pretrained_model(model):
        return
    kept: Any = model
    config = deepcopy(kept.config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    if kept.can_generate():
        kept.generation_config.save_pretrained(folder)


def is_ignored(model: Any, name: str) -> bool:
    """Whether the model says that its checkpoints may have this tensor for nothing."""
    patterns = [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq"]
    return any(re.search(pattern, name) for pattern in patterns)


def stays_float32(model: Any, name: str, dtype: torch.dtype) -> bool:
    """Whether `from_pretrained`, when asked for `dtype`, leaves this weight in float32."""
    kept: set[str] = set()
    if dtype in (torch.float16, torch.bfloat16):
        kept |= set(model._keep_in_fp32_modules_strict or ())
    if dtype is torch.float16:
        kept |= set(model._keep_in_fp32_modules or ())
    return any(re.search(pattern.replace("*", ".*"), name) for pattern in kept)


def compute_buffers(model: Any, modules: Iterable[nn.Module]) -> None:
    """Let the model's own code fill the buffers of these modules; nothing else is touched."""
    for value in [*model.parameters(), *model.buffers()]:
        value._is_hf_initialized = True
    for module in model.modules():
        module._is_hf_initialized = True
    for module in modules:
        module._is_hf_initialized = False  # type: ignore[assignment]
        for buffer in module.buffers(recurse=False):
            buffer._is_hf_initialized = False  # type: ignore[attr-defined]
    model.initialize_weights()

"""The model of a config.json, on the meta device."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from fgtp_pass.errors import ConfigError, first_line


def build(config: Mapping[str, Any]) -> nn.Module:
    """The causal language model of a config.json, on the meta device, in its dtype.

    Raises ConfigError for a config that transformers cannot build.
    """
    given = {k: v for k, v in config.items() if k not in ("quantization_config", "auto_map")}
    model_type = given.pop("model_type", None)
    if model_type not in CONFIG_MAPPING:
        raise ConfigError(f"transformers knows no model_type {model_type!r}")
    from_config: Any = AutoModelForCausalLM.from_config
    try:
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            parsed = CONFIG_MAPPING[model_type].from_dict(given).get_text_config()
            model: nn.Module = from_config(parsed)
    except Exception as error:  # whatever a wrong value makes transformers raise
        raise ConfigError(f"transformers cannot build this config: {first_line(error)}") from None
    dtype = str(getattr(parsed, "dtype", None) or "bfloat16").removeprefix("torch.")
    return model.to(getattr(torch, dtype)).eval().requires_grad_(False)

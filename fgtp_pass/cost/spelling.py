"""Sizes as users and other systems write them."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fgtp_pass.hints import config_error
from fgtp_pass.plan.sizes import COMPONENT_SIZES, Component, ComponentSizes, parse_sizes

# where vLLM (--additional-config) and MindIE (ModelDeployConfig) keep their sizes
_WRAPPERS = (COMPONENT_SIZES, "ModelDeployConfig", "ModelConfig", "models", "parallel_options")


def read_sizes(text: str, components: Sequence[Component]) -> ComponentSizes:
    """Sizes from the command line.

    One number for all components that are not opt-in; `oproj=8,mlp=4` with component names or any
    system's keys; SGLang's flags (`--moe-dense-tp-size 8`); or JSON, be it a
    `finegrained_tp_config`, vLLM's --additional-config or MindIE's config.json. Raises ConfigError
    for anything else.
    """
    text = text.strip()
    if text == "auto":
        return parse_sizes(None, components)
    if re.fullmatch(r"-?\d+", text):
        usual = (known for known in components if not known.opt_in)
        return parse_sizes({known.config_key: int(text) for known in usual}, components)
    if text.startswith("{"):
        try:
            given = _unwrap(json.loads(text))
        except ValueError as error:
            raise config_error(f"--sizes is not JSON: {error}") from None
    else:
        given = dict(_pair(part) for part in re.split(r",\s*|\s+(?=--)", text))
    return parse_sizes(given, [_NamedComponent(known) for known in components])


class _NamedComponent:
    """A component that goes by its own name too."""

    def __init__(self, known: Component):
        self.component = known.component
        self.config_key = known.config_key
        self.aliases = (known.component, *known.aliases)
        self.opt_in = known.opt_in


def _pair(text: str) -> tuple[str, Any]:
    found = re.fullmatch(r"(-{0,2})([\w-]+?)[=\s]+(-?\d+|auto|off)", text.strip())
    if found is None:
        raise config_error(
            f"--sizes: {text!r} is no size. Write 8, or oproj=8,mlp=4, or JSON with the keys of "
            f"{COMPONENT_SIZES}."
        )
    key = found[2].replace("-", "_") if found[1] else found[2]
    value = found[3]
    return key, value if value == "auto" else 1 if value == "off" else int(value)


def _unwrap(given: Any) -> Any:
    """The innermost mapping of sizes: a wrapper holds one, or a list of one, or one model's."""
    while isinstance(given, Mapping):
        inner = next((given[key] for key in _WRAPPERS if key in given), None)
        if inner is None and len(given) == 1 and isinstance(next(iter(given.values())), Mapping):
            inner = next(iter(given.values()))  # the model's name, in MindIE
        if inner is None:
            return given
        given = inner[0] if isinstance(inner, list) and len(inner) == 1 else inner
    return given


def vllm_config(sizes: Mapping[str, int], components: Sequence[Component]) -> dict[str, int]:
    """The `finegrained_tp_config` of these sizes."""
    return {
        known.config_key: sizes[known.component]
        for known in components
        if sizes.get(known.component, 1) > 1
    }

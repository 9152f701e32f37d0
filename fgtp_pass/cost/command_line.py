"""A `vllm serve` command line, read back: what it asks for, to plan that."""

import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fgtp_pass.hints import config_error
from fgtp_pass.plan.sizes import COMPONENT_SIZES

# flag -> what it is, and how its value is read
_FLAGS: Mapping[str, tuple[str, Callable[[str], Any]]] = {
    "--model": ("model", str),
    "--tensor-parallel-size": ("tensor_parallel_size", int),
    "-tp": ("tensor_parallel_size", int),
    "--pipeline-parallel-size": ("pipeline_parallel_size", int),
    "-pp": ("pipeline_parallel_size", int),
    "--data-parallel-size": ("data_parallel_size", int),
    "-dp": ("data_parallel_size", int),
    "--data-parallel-size-local": ("ranks_per_node", int),
    "-dpl": ("ranks_per_node", int),
    "--max-model-len": ("context", lambda text: _count(text)),
    "--max-num-seqs": ("sequences_per_rank", int),
    "--quantization": ("quantization", str),
    "-q": ("quantization", str),
    "--kv-cache-dtype": ("cache_dtype", str),
    "--additional-config": ("additional_config", json.loads),
}
_SWITCHES = {"--enable-expert-parallel": "expert_parallel", "-ep": "expert_parallel"}
# vLLM's names of schemes -> ours; any other is for a checkpoint that says itself what it is
_SCHEMES = {"fp8": "fp8"}


@dataclass(frozen=True)
class ServeCommand:
    """What a command line says; None and {} for what it does not. ignored: flags without a part in
    the plan.
    """

    model: str
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    data_parallel_size: int = 1
    ranks_per_node: int | None = None
    expert_parallel: bool = False
    context: int | None = None
    sequences_per_rank: int | None = None
    quantization: str | None = None
    cache_dtype: str | None = None
    additional_config: Mapping[str, Any] | None = None
    ignored: tuple[str, ...] = ()

    @property
    def devices(self) -> int:
        return self.tensor_parallel_size * self.pipeline_parallel_size * self.data_parallel_size

    @property
    def sizes(self) -> Any:
        """Its `finegrained_tp_config`, or None."""
        return (self.additional_config or {}).get(COMPONENT_SIZES)

    @property
    def scheme(self) -> str | None:
        return _SCHEMES.get(self.quantization or "")


def read_command(text: str) -> ServeCommand:
    """Read `vllm serve MODEL ...`. Raises ConfigError for what is no such line."""
    try:
        words = shlex.split(text.replace("\\\n", " "))
    except ValueError as error:
        raise config_error(f"--from: the command cannot be read: {error}") from None
    if words[:2] != ["vllm", "serve"]:
        raise config_error("--from takes a command that starts with: vllm serve MODEL")
    found: dict[str, Any] = {}
    ignored: list[str] = []
    rest = [part for word in words[2:] for part in _split(word)]
    while rest:
        word = rest.pop(0)
        if word in _SWITCHES:
            found[_SWITCHES[word]] = True
        elif word in _FLAGS:
            name, read = _FLAGS[word]
            if not rest:
                raise config_error(f"--from: {word} has no value")
            value = rest.pop(0)
            try:
                found[name] = read(value)
            except ValueError:
                raise config_error(f"--from: {word} cannot be {value!r}") from None
        elif word.startswith("-"):
            ignored.append(word)
            if rest and not rest[0].startswith("-"):
                rest.pop(0)
        elif "model" not in found:
            found["model"] = word
    if "model" not in found:
        raise config_error("--from: the command names no model")
    return ServeCommand(**found, ignored=tuple(ignored))


def _split(word: str) -> list[str]:
    """`--flag=value` as two words, and flags spelled as vLLM's help does."""
    flag, equals, value = word.partition("=")
    if flag.startswith("--"):
        flag = flag.replace("_", "-")
    elif flag not in _FLAGS:
        return [word]
    return [flag, value] if equals else [flag]


def _count(text: str) -> int:
    """A number of tokens as vLLM takes it: 4096, 32k, 1M."""
    factors = {"k": 1000, "K": 1024, "m": 10**6, "M": 2**20}
    if text and text[-1] in factors:
        return int(float(text[:-1]) * factors[text[-1]])
    return int(text)

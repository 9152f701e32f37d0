"""How weights are kept and multiplied: the schemes that go by name, and those of checkpoints."""

import re
from collections.abc import Mapping
from fnmatch import translate
from functools import lru_cache

from pydantic import BaseModel, ConfigDict

from fgtp_pass.hints import config_error, unknown
from fgtp_pass.plan.plan import itemsize


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Rule(_Frozen):
    """What is done to the matmul weights of some modules.

    modules: patterns of their names, see `matches`; none for all modules. bits: of one element,
    its share of scales and zero points included; None leaves them in the model's dtype.
    matmul_dtype: what they are multiplied in; None for the model's dtype.
    """

    modules: tuple[str, ...] = ()
    bits: float | None = None
    matmul_dtype: str | None = None


class Scheme(_Frozen):
    """A quantisation scheme: the first rule that fits a module holds.

    Embeddings and lm_heads stay in the model's dtype under every scheme.
    """

    name: str
    rules: tuple[Rule, ...]

    def rule(self, module: str) -> Rule:
        return next((rule for rule in self.rules if matches(module, rule.modules)), Rule())


@lru_cache(maxsize=4096)
def matches(module: str, patterns: tuple[str, ...]) -> bool:
    """Whether a module's dotted name fits one of a checkpoint's patterns; no pattern fits all.

    As their writers mean them: `re:` and a regular expression, a name with wildcards, or one or
    more parts of a dotted name. Prefixes such as `language_model.` are not told apart.
    """
    return not patterns or any(_matches_one(module, pattern) for pattern in patterns)


def _matches_one(module: str, pattern: str) -> bool:
    if pattern.startswith("re:"):
        return re.search(pattern.removeprefix("re:").lstrip("^"), module) is not None
    inner = pattern.removeprefix("language_model.").strip(".")
    if "*" in inner:
        return re.search(r"(^|\.)" + translate(inner).removesuffix(r"\Z"), module) is not None
    return f".{inner}." in f".{module}."


def _named(name: str, bits: float, matmul_dtype: str | None) -> Scheme:
    return Scheme(name=name, rules=(Rule(bits=bits, matmul_dtype=matmul_dtype),))


# Scales: one of 16 bits for 128 elements in w4a16, of 8 bits for 32 in mxfp4 and for 16 in nvfp4;
# in the others one for a channel, or for a block of 128 x 128, which is nothing.
SCHEMES: Mapping[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        _named("w8a8", 8, "int8"),
        _named("fp8", 8, "float8"),
        _named("w8a16", 8, None),
        _named("w4a16", 4 + 16 / 128, None),
        _named("mxfp4", 4 + 8 / 32, "float4"),
        _named("nvfp4", 4 + 8 / 16, "float4"),
    )
}


def scheme_of(name: str) -> Scheme:
    """The scheme of this name. Raises ConfigError for a name that is none, with the nearest."""
    if name not in SCHEMES:
        raise config_error(unknown("scheme", name, [*SCHEMES, "none"], "quantization"))
    return SCHEMES[name]


class Precision(_Frozen):
    """Bytes of one element of a weight matrix, and the dtype that it is multiplied in."""

    element_bytes: float
    matmul_dtype: str


def precision(dtype: str, scheme: Scheme | None, module: str) -> Precision:
    """How a matmul weight of a module is kept and multiplied. dtype: the model's."""
    rule = Rule() if scheme is None else scheme.rule(module)
    if rule.bits is None:
        return Precision(element_bytes=itemsize(dtype), matmul_dtype=dtype)
    return Precision(element_bytes=rule.bits / 8, matmul_dtype=rule.matmul_dtype or dtype)


_CACHE_DTYPES = {"auto": None, "bfloat16": 2.0, "float16": 2.0, "fp8": 1.0}


def cache_element_bytes(dtype: str, cache_dtype: str | None) -> float:
    """Bytes of one element of the KV cache. Raises ConfigError for a dtype that nobody keeps.

    cache_dtype: bfloat16, float16, fp8 (or a vLLM name of it), or None and "auto" for the model's.
    """
    if cache_dtype is None:
        return itemsize(dtype)
    name = "fp8" if cache_dtype.startswith("fp8") else cache_dtype
    if name not in _CACHE_DTYPES:
        raise config_error(unknown("dtype", cache_dtype, list(_CACHE_DTYPES), "--kv-dtype"))
    return _CACHE_DTYPES[name] or itemsize(dtype)

"""What a config.json says of how its checkpoint is quantised, in the words of the cost model."""

from collections.abc import Mapping, Sequence
from typing import Any

from fgtp_pass.cost.quantization import SCHEMES, Rule, Scheme

# where each tool lists the modules that it left as they were
_LEFT = ("ignore", "modules_to_not_convert", "exclude_modules", "exclude", "llm_int8_skip_modules")


def declared_scheme(config: Mapping[str, Any]) -> Scheme | None:
    """The scheme of a config's checkpoint; None for one that is not quantised.

    A method that is not known comes back as a scheme without rules under its own name, for
    whoever uses it to refuse.
    """
    declared = _declared(config)
    if not declared:
        return None
    method = str(declared.get("quant_method") or declared.get("quant_algo") or "").lower()
    rules = _rules(method, declared)
    left = tuple(str(name) for key in _LEFT for name in declared.get(key) or ())
    kept = (Rule(modules=left),) if left else ()
    return Scheme(name=_name(method, rules), rules=kept + rules if rules else ())


def declared_cache_dtype(config: Mapping[str, Any]) -> str | None:
    """ "fp8" where the checkpoint brings scales for a cache of 8 bits, else None."""
    declared = _declared(config)
    scheme = declared.get("kv_cache_scheme") or {}
    algorithm = str(declared.get("kv_cache_quant_algo") or "").lower()
    return "fp8" if algorithm == "fp8" or scheme.get("num_bits") == 8 else None


def _declared(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The innermost quantization_config; compressed-tensors and modelopt may wrap theirs."""
    inner = config.get("text_config") or {}
    found = config.get("quantization_config") or config.get("compression_config")
    found = found or inner.get("quantization_config") or {}
    return found.get("quantization") or found


def _rules(method: str, declared: Mapping[str, Any]) -> tuple[Rule, ...]:
    """What is done to the modules that are not left as they were; nothing if nobody knows."""
    bits = declared.get("bits") or declared.get("w_bit") or declared.get("nbits")
    if method == "compressed-tensors" or (method == "modelopt" and "config_groups" in declared):
        groups = declared.get("config_groups") or {}
        return tuple(_group_rule(group) for group in groups.values())
    if method == "modelopt" or method.startswith(("nvfp4", "fp8")):
        algorithm = str(declared.get("quant_algo") or method).lower()
        return _by_name("nvfp4" if "fp4" in algorithm else "fp8" if "fp8" in algorithm else "")
    if method == "quark":
        inner = (declared.get("global_quant_config") or {}).get("weight") or {}
        dtype = str(inner.get("dtype"))
        return _by_name("mxfp4" if "fp4" in dtype else "fp8" if "fp8" in dtype else "w8a8")
    if method in ("awq", "gptq", "awq_marlin", "gptq_marlin", "auto-round", "auto_awq", "hqq"):
        return (Rule(bits=_with_scales(float(bits or 4), declared.get("group_size", 128), 16)),)
    if method == "bitsandbytes":
        wide = not declared.get("load_in_4bit")
        return (Rule(bits=8.0 if wide else _with_scales(4.0, 64, 8)),)
    return _by_name({"fbgemm_fp8": "fp8", "experts_int8": "w8a16"}.get(method, method))


def _by_name(name: str) -> tuple[Rule, ...]:
    return SCHEMES[name].rules if name in SCHEMES else ()


def _group_rule(group: Mapping[str, Any]) -> Rule:
    """The rule of one of compressed-tensors' groups."""
    weights, inputs = group.get("weights") or {}, group.get("input_activations")
    bits, kind = float(weights.get("num_bits") or 16), weights.get("type", "int")
    size = weights.get("group_size")
    scale = 8 if kind == "float" and bits == 4 else 16
    per_element = _with_scales(bits, size if weights.get("strategy") != "channel" else None, scale)
    computed = {("int", 8.0): "int8", ("float", 8.0): "float8", ("float", 4.0): "float4"}
    narrow = inputs is not None and float(inputs.get("num_bits") or 16) == bits
    return Rule(
        modules=_targets(group.get("targets") or ()),
        bits=per_element,
        matmul_dtype=computed.get((str(kind), bits)) if narrow else None,
    )


def _targets(targets: Sequence[str]) -> tuple[str, ...]:
    """Names of classes such as Linear stand for all modules."""
    return () if any(target.isidentifier() for target in targets) else tuple(targets)


def _with_scales(bits: float, group_size: Any, scale_bits: int) -> float:
    """Bits of one element with its share of a scale."""
    return (
        bits + scale_bits / group_size if isinstance(group_size, int) and group_size > 0 else bits
    )


def _name(method: str, rules: Sequence[Rule]) -> str:
    """The name of the scheme that has the same rule for most modules, else the method's own."""
    if not rules or rules[-1].bits is None:
        return method or "unnamed"
    bits, dtype = rules[-1].bits, rules[-1].matmul_dtype
    alike = {  # but for the share of scales, by which it is one of mxfp4 and nvfp4
        scheme.name: abs((known.bits or 0) - bits)
        for scheme in SCHEMES.values()
        for known in scheme.rules
        if (int(known.bits or 0), known.matmul_dtype) == (int(bits), dtype)
    }
    return min(alike, key=alike.__getitem__) if alike else method or "unnamed"

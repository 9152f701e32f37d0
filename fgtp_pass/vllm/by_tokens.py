"""Two compiled graphs for one: for steps with few tokens and with many."""

import pickle
from typing import Any

from torch._dynamo.aot_compile_types import (
    BundledAOTAutogradSerializableCallable,
    SerializableCallable,
)


class ByTokens(SerializableCallable):
    """Calls `many` from `first` tokens on, and `few` below; vLLM keeps it on disk as one.

    position, dim: the input whose size, or which itself where dim is None, is the number of tokens.
    It is the padded one, so it is the same on all data-parallel ranks.
    """

    def __init__(self, few: Any, many: Any, first: int, position: int, dim: int | None):
        self.few, self.many = map(_serializable, (few, many))
        self.first, self.position, self.dim = first, position, dim

    def __call__(self, *args: Any) -> Any:
        given = args[self.position]
        tokens = given if self.dim is None else given.shape[self.dim]
        return (self.many if tokens >= self.first else self.few)(*args)

    @classmethod
    def serialize_compile_artifacts(cls, fn: "ByTokens") -> bytes:
        kept = {
            "kind": type(fn.few),
            "few": fn.few.serialize_compile_artifacts(fn.few),
            "many": fn.many.serialize_compile_artifacts(fn.many),
            "at": (fn.first, fn.position, fn.dim),
        }
        return pickle.dumps(kept)

    @classmethod
    def deserialize_compile_artifacts(cls, data: bytes) -> "ByTokens":
        kept = pickle.loads(data)
        few, many = (kept["kind"].deserialize_compile_artifacts(kept[n]) for n in ("few", "many"))
        return cls(few, many, *kept["at"])

    def finalize_loading(self, vllm_config: Any) -> None:
        """What vLLM calls once it has read one from disk; only those of its own backend need it."""
        for one in (self.few, self.many):
            if hasattr(one, "finalize_loading"):
                one.finalize_loading(vllm_config)


def _serializable(compiled: Any) -> Any:
    """What Inductor compiled, as torch itself makes it ready to be kept; anything else as it is."""
    own = not isinstance(compiled, SerializableCallable) and getattr(compiled, "serialize", None)
    return BundledAOTAutogradSerializableCallable(compiled) if own else compiled


def another(backend: Any) -> Any:
    """A backend like the one that vLLM chose: one of its own compiles a single graph."""
    if isinstance(backend, str) or not hasattr(backend, "vllm_config"):
        return backend
    prefix = f"{backend.prefix}_many_tokens"  # a folder of its own in the compile cache
    return type(backend)(backend.vllm_config, prefix=prefix, is_encoder=backend.is_encoder)

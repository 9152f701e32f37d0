"""What planning needs to know of a model, without the model: `ModelSummary`."""

from pydantic import BaseModel, ConfigDict

from fgtp_pass.plan import Plan, itemsize


class ComponentKey(BaseModel):
    """A component and its keys in `finegrained_tp_config`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    component: str
    config_key: str
    aliases: tuple[str, ...]


class ModelSummary(BaseModel):
    """All that planning needs to know of a model.

    dtype: of its parameters. layers: decoder layers. kv_width: elements that attention caches per
    token and layer. latent: whether these are one latent for all heads (MLA), which cannot be cut
    by heads. kv_heads, attention_heads: what tensor parallelism cuts. plan: the sites of all its
    components (at two ranks; the size does not matter to costs). experts, others: elements of
    routed experts' weights, and of every other parameter that no component has; linears: how many
    of the others' are matmul weights. quantization: the scheme that the
    config declares, which the cost model may not know, or None.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    architecture: str
    dtype: str
    layers: int
    attention_heads: int
    kv_heads: int
    kv_width: int
    latent: bool
    quantization: str | None
    experts: int
    linears: int
    others: int
    keys: tuple[ComponentKey, ...]
    plan: Plan

    def kv_bytes_per_token(self, tensor_parallel_size: int = 1) -> float:
        """Bytes of KV cache that one device holds per token, in the model's dtype.

        Heads are cut by tensor parallelism, as far as there are KV heads; a latent is not.
        """
        cut = 1 if self.latent else min(tensor_parallel_size, self.kv_heads)
        return self.layers * self.kv_width * itemsize(self.dtype) / cut

"""What planning needs to know of a model, without the model: `ModelSummary`."""

from pydantic import BaseModel, ConfigDict

from fgtp_pass.cost.quantization import Precision, Scheme, precision
from fgtp_pass.plan.plan import Plan

# whose sites share stretches, and save a message each, where both have one size
JOINED = ("oproj", "mlp")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ComponentKey(_Frozen):
    """A component and its keys in `finegrained_tp_config`."""

    component: str
    config_key: str
    aliases: tuple[str, ...]
    opt_in: bool


class AttentionKind(_Frozen):
    """What some alike layers keep of a sequence, and what a decode step does with it.

    layers: how many are alike. heads: KV heads, by which tensor parallelism cuts what is kept; 1
    for what every head reads whole (multi-query attention, MLA's latent, an indexer's keys).
    width: elements kept per token, over all heads. window: tokens kept at most, None for all.
    reads: tokens of those kept that a step reads at most, None for all (sparse attention).
    state_bytes: bytes kept per sequence, however long it is (convolutions, recurrent states).
    decode_flops, prefill_flops: of all heads, for one query token and one token that it attends to.
    """

    layers: int
    heads: int = 1
    width: int = 0
    window: int | None = None
    reads: int | None = None
    state_bytes: int = 0
    decode_flops: int = 0
    prefill_flops: int = 0

    def kept(self, context: int) -> int:
        """Tokens that the cache keeps of a sequence of `context` tokens."""
        return context if self.window is None else min(context, self.window)

    def cache_bytes(
        self, context: int, element_bytes: float, tensor_parallel_size: int = 1
    ) -> float:
        """Bytes that one device keeps of one sequence, in all layers of this kind."""
        per_token = self.width * element_bytes / min(tensor_parallel_size, self.heads)
        return self.layers * (
            self.kept(context) * per_token + self.state_bytes / tensor_parallel_size
        )


class Weights(_Frozen):
    """Matmul weights: their elements, and how the checkpoint's own scheme keeps them.

    declared_bytes: of all of them. declared_dtype: what most are multiplied in, None for the
    model's.
    """

    elements: int = 0
    declared_bytes: float = 0
    declared_dtype: str | None = None

    def precision(self, dtype: str, scheme: Scheme | None, declared: Scheme | None) -> Precision:
        """How they are kept and multiplied under a scheme. declared: the checkpoint's own."""
        if self.elements and scheme is not None and scheme == declared:
            return Precision(
                element_bytes=self.declared_bytes / self.elements,
                matmul_dtype=self.declared_dtype or dtype,
            )
        return precision(dtype, scheme, "")


class RoutedExperts(_Frozen):
    """The experts that a router chooses from. layers: with experts. count: of one layer. active:
    chosen for a token. weights: of all experts in all layers.
    """

    layers: int
    count: int
    active: int
    weights: Weights


class DraftLayers(_Frozen):
    """Layers for multi-token prediction, which a checkpoint brings and an engine may load.

    linears, experts: weights of all of them. Their cache is that of the model's last kind of
    attention.
    """

    layers: int
    linears: Weights
    experts: Weights


class ModelSummary(_Frozen):
    """All that planning needs to know of a model.

    dtype: of its parameters. layers: decoder layers. hidden: width of the residual stream.
    attention: what its layers keep and read. cache_assumed: why `attention` is taken from the
    config and not from the model itself, or None. latent: whether all heads share a latent (MLA).
    attention_heads, kv_heads: what tensor parallelism cuts (0 for a model without attention).
    plan: the sites of all its components (at two ranks; the size does not matter to costs), each by
    itself. joined: those of `JOINED` where they share stretches, None if none do.
    linears, replicated: matmul weights that no component has; the latter, such as routers and
    projections into a latent, are whole on every rank of tensor parallelism. vectors: elements of
    all else. scheme, cache_dtype: what the checkpoint declares.
    """

    name: str
    architecture: str
    model_type: str
    dtype: str
    layers: int
    hidden: int
    vocabulary: int
    attention_heads: int
    kv_heads: int
    attention: tuple[AttentionKind, ...]
    cache_assumed: str | None = None
    latent: bool
    scheme: Scheme | None = None
    cache_dtype: str | None = None
    experts: RoutedExperts | None = None
    linears: Weights
    replicated: Weights = Weights()
    vectors: int
    draft: DraftLayers | None = None
    keys: tuple[ComponentKey, ...]
    plan: Plan
    joined: Plan | None = None

    def cache_bytes(
        self, context: int, element_bytes: float, tensor_parallel_size: int = 1, draft: bool = False
    ) -> float:
        """Bytes that one device keeps of one sequence of `context` tokens.

        Heads are cut by tensor parallelism as far as there are KV heads; beyond, engines hold
        copies. draft: with the layers for multi-token prediction.
        """
        kinds = [*self.attention]
        if draft and self.draft is not None:
            kinds.append(kinds[-1].model_copy(update={"layers": self.draft.layers}))
        return sum(kind.cache_bytes(context, element_bytes, tensor_parallel_size) for kind in kinds)

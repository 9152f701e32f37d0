"""The formulas of a whole step under a layout: attention, experts, tensor parallelism.

A layout puts `tensor_parallel` devices to one data-parallel rank, and routed experts over
`expert_devices` of them. Everything is for one device and one step of `tokens` tokens of its
data-parallel rank: a token of each of `sequences` sequences in decode, a prompt in prefill. Parts
that components have are priced by `formulas`; these add what they stand beside. Symbols are summed
over layers, as there.
"""

from collections.abc import Mapping

import sympy
from sympy import Eq, Expr, Max, Min, Piecewise, Symbol

from fgtp_pass.algebra.path import sent_bytes
from fgtp_pass.algebra.placement import Collective
from fgtp_pass.cost.formulas import (
    LINK_CLASSES,
    MATMUL_RATE,
    MATMUL_SECONDS,
    MEMORY_BANDWIDTH,
    TOKENS,
    LinkClass,
    _symbol,
    collective_seconds,
    roofline,
)

# the load of one data-parallel rank
SEQUENCES = _symbol("sequences")
CONTEXT = _symbol("context")  # tokens that a sequence has in the cache, in the middle of its output
PREFILLS = _symbol("prefills")  # 1 for a step that takes in prompts, 0 for decode

# the layout
TENSOR_PARALLEL = Symbol("tensor_parallel", positive=True)
EXPERT_DEVICES = Symbol("expert_devices", positive=True)
DEVICES_PER_NODE = Symbol("devices_per_node", positive=True)

# the model
LAYERS = _symbol("layers")
ROW = _symbol("row")  # bytes of a token in the residual stream
LOGITS_ROW = _symbol("logits_row")  # bytes of the logits of a token
LINEARS = _symbol("linears")  # elements of matmuls that no component has
LINEAR_BYTES = _symbol("linear_bytes")  # bytes of one of them
REPLICATED = _symbol("replicated")  # elements of those that tensor parallelism leaves whole
REPLICATED_BYTES = _symbol("replicated_bytes")

# one kind of attention
KIND_LAYERS = _symbol("kind_layers")
KEPT_BYTES = _symbol("kept_bytes")  # bytes kept per token in one layer, over all heads
KV_HEADS = Symbol("kv_heads", positive=True)
KEPT_LIMIT = _symbol("kept_limit")  # tokens kept at most
READ_LIMIT = _symbol("read_limit")  # tokens that a query attends to at most
STATE_BYTES = _symbol("state_bytes")
DECODE_FLOPS = _symbol("decode_flops")  # per query token and token attended to, in one layer
PREFILL_FLOPS = _symbol("prefill_flops")

# routed experts
EXPERTS = Symbol("experts", positive=True)  # of one layer
ACTIVE = _symbol("active")  # chosen for a token
EXPERT_LAYERS = _symbol("expert_layers")
EXPERT_ELEMENTS = _symbol("expert_elements")
EXPERT_BYTES = _symbol("expert_bytes")  # of one element
DISPATCH_ROW = _symbol("dispatch_row")  # bytes of a token on its way to an expert
IMBALANCE = _symbol("imbalance")  # the busiest device's share of the tokens, over the mean

# fixed times: of a layer beside its matmuls, and of sending to experts and back
LAYER_SECONDS = _symbol("layer_seconds")
EXPERT_LINK_BASE: Mapping[LinkClass, Symbol] = {
    link: _symbol(f"{link}_experts_base") for link in LINK_CLASSES
}
EXPERT_LINK_BANDWIDTH: Mapping[LinkClass, Symbol] = {
    link: Symbol(f"{link}_experts_bandwidth", positive=True) for link in LINK_CLASSES
}


def linears_seconds() -> Expr:
    """Seconds of the matmuls that no component has: q, k and v, latents, routers.

    Tensor parallelism cuts all but the projections into a latent and the routers. The fixed time
    of these matmuls is part of `layer_seconds`, since engines fuse them in their own ways.
    """
    reading = LINEARS * LINEAR_BYTES / TENSOR_PARALLEL + REPLICATED * REPLICATED_BYTES
    elements = LINEARS / TENSOR_PARALLEL + REPLICATED
    return roofline(reading / MEMORY_BANDWIDTH, 2 * elements * TOKENS / MATMUL_RATE)


def attention_seconds() -> Expr:
    """Seconds of one kind of attention.

    A decode step reads what is kept of each sequence, at most `read_limit` tokens of it, and reads
    and writes its states; KV heads are cut by tensor parallelism as far as there are any. Each
    query token costs `decode_flops` for each token that it attends to. In prefill a token attends
    to half of its prompt on average, or within a window w to w (1 - w / (2 n)) of its n tokens, and
    what it reads is the cache's entries of its own prompt, once.
    """
    attended = Min(CONTEXT, READ_LIMIT)
    causal = attended * (1 - attended / (2 * CONTEXT))
    flops = Piecewise((DECODE_FLOPS * attended, Eq(PREFILLS, 0)), (PREFILL_FLOPS * causal, True))
    heads = Min(TENSOR_PARALLEL, KV_HEADS)
    reading = SEQUENCES * (attended * KEPT_BYTES / heads + 2 * STATE_BYTES / TENSOR_PARALLEL)
    computing = TOKENS * flops / (TENSOR_PARALLEL * MATMUL_RATE)
    return KIND_LAYERS * roofline(reading / MEMORY_BANDWIDTH, computing)


def experts_seconds() -> Expr:
    """Seconds of the routed experts' matmuls.

    The data-parallel ranks that share the experts bring g = tokens * expert_devices /
    tensor_parallel tokens, each of which chooses `active` of them. An expert is read if any token
    chose it: of evenly chosen ones 1 - (1 - active / experts)^g are. Two matmuls a layer (gate and
    up are one) take their fixed time.
    """
    together = TOKENS * EXPERT_DEVICES / TENSOR_PARALLEL
    touched = 1 - (1 - ACTIVE / EXPERTS) ** together
    reading = touched * EXPERT_ELEMENTS * EXPERT_BYTES / EXPERT_DEVICES
    one = EXPERT_ELEMENTS / EXPERTS
    computing = 2 * one * ACTIVE * together / EXPERT_DEVICES * _imbalance() / MATMUL_RATE
    fixed = 2 * EXPERT_LAYERS * MATMUL_SECONDS
    return fixed + roofline(reading / MEMORY_BANDWIDTH, computing)


def _imbalance() -> Expr:
    """Experts that are cut rather than handed out are used evenly."""
    handed_out = EXPERT_DEVICES > TENSOR_PARALLEL
    return Piecewise((IMBALANCE, handed_out), (sympy.Integer(1), True))


def exchange_seconds() -> Expr:
    """Seconds of the all_to_all that sends tokens to their experts, and of the one back.

    Each of a device's tokens / tensor_parallel tokens goes to `active` experts, there in
    `dispatch_row` bytes and back in the residual stream's; in prefill it goes once to each node at
    most. Of evenly spread experts (e - n) / e are in other nodes of n devices and (n - 1) / e on
    other devices of this one; both go at the same time. The busiest device, which all wait for,
    gets `imbalance` times its share. 0 where every data-parallel rank has all experts.
    """
    node = Min(DEVICES_PER_NODE, EXPERT_DEVICES)
    remote, local = (EXPERT_DEVICES - node) / EXPERT_DEVICES, (node - 1) / EXPERT_DEVICES
    nodes = EXPERT_DEVICES / node
    copies = Piecewise((ACTIVE, Eq(PREFILLS, 0)), (Min(ACTIVE, nodes), True))
    own = IMBALANCE * TOKENS / TENSOR_PARALLEL * (DISPATCH_ROW + ROW)
    within, across = LINK_CLASSES
    sending = Max(
        own * ACTIVE * local / EXPERT_LINK_BANDWIDTH[within],
        own * copies * remote / EXPERT_LINK_BANDWIDTH[across],
    )
    base = Piecewise((EXPERT_LINK_BASE[within], Eq(remote, 0)), (EXPERT_LINK_BASE[across], True))
    total = EXPERT_LAYERS * (2 * base + sending)
    return Piecewise((total, EXPERT_DEVICES > TENSOR_PARALLEL), (sympy.Integer(0), True))


def tensor_parallel_seconds() -> Expr:
    """Seconds of tensor parallelism's collectives: an all_reduce behind attention, one behind the
    FFN and one behind the embedding, and an all_gather of the logits. 0 without it.
    """
    size = TENSOR_PARALLEL
    reduced = sent_bytes(Collective.ALL_REDUCE, ROW, size) * TOKENS / size
    count = 2 * LAYERS + 1
    reducing = collective_seconds(
        Collective.ALL_REDUCE, count, count * reduced, size, DEVICES_PER_NODE
    )
    gathered = sent_bytes(Collective.ALL_GATHER, LOGITS_ROW / size, size) * SEQUENCES
    gathering = collective_seconds(
        Collective.ALL_GATHER, sympy.Integer(1), gathered, size, DEVICES_PER_NODE
    )
    return Piecewise((sympy.Integer(0), Eq(size, 1)), (reducing + gathering, True))


# Seconds of a step by part; attention is that of one kind of layers. A component adds its own.
LINEARS_SECONDS: Expr = linears_seconds()
ATTENTION_SECONDS: Expr = attention_seconds()
EXPERTS_SECONDS: Expr = experts_seconds()
EXCHANGE_SECONDS: Expr = exchange_seconds()
TENSOR_PARALLEL_SECONDS: Expr = tensor_parallel_seconds()
FIXED_SECONDS: Expr = LAYERS * LAYER_SECONDS

# Bytes that one device keeps of one sequence of `context` tokens, in one kind of attention.
CACHE_BYTES: Expr = KIND_LAYERS * (
    Min(CONTEXT, KEPT_LIMIT) * KEPT_BYTES / Min(TENSOR_PARALLEL, KV_HEADS)
    + STATE_BYTES / TENSOR_PARALLEL
)

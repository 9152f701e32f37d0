"""packing: shards of plain matmuls in oneDNN's blocked layout, on CPUs where oneDNN has one.

A packed tensor keeps its metadata and gives up its data for an attribute that holds them in the
layout which oneDNN's matmul reads fastest. Only `fgtp_pass::linear` can read it; that op takes
plain weights too, so a graph that has it can be called with either.
"""

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import fx

# The layout is chosen for a number of rows. The one for a single row is slow with more; those for
# 8 to 512 rows are alike, and with a single row no slower.
_ROWS = 64

_library = torch.library.Library("fgtp_pass", "DEF")  # type: ignore[no-untyped-call]
_library.define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")  # type: ignore[no-untyped-call]


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    packed = _packed(weight)
    if packed is None:
        return F.linear(x, weight, bias)
    out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return out


def _linear_fake(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _plain(weight: torch.Tensor) -> torch.Tensor:
    return weight.clone() if _packed(weight) is None else plain(weight)


_library.define("plain(Tensor weight) -> Tensor")  # type: ignore[no-untyped-call]
_library.impl("plain", _plain, "CPU")  # type: ignore[no-untyped-call]
torch.library.register_fake("fgtp_pass::plain", torch.empty_like, lib=_library)
_library.impl("linear", _linear, "CPU")  # type: ignore[no-untyped-call]
torch.library.register_fake("fgtp_pass::linear", _linear_fake, lib=_library)


PLAIN = torch.ops.fgtp_pass.plain.default


def pack(weight: torch.Tensor) -> None:
    """Pack a tensor [out, in], contiguous, in place. Its memory goes when no one else holds it."""
    with torch.inference_mode(False), torch.no_grad():
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)
        hollow = torch.empty_like(weight)
        hollow.untyped_storage().resize_(0)
        # not by resizing its own storage: once numpy has seen that, it cannot be resized
        weight.data = hollow
    weight._fgtp_packed = packed  # type: ignore[attr-defined]


def unpack(weight: torch.Tensor) -> None:
    """Make a packed tensor plain again, in place and bit for bit; a plain one stays as it is."""
    if _packed(weight) is not None:
        with torch.inference_mode(False), torch.no_grad():
            weight.data = plain(weight)
        del weight._fgtp_packed  # type: ignore[attr-defined]


def plain(weight: torch.Tensor) -> torch.Tensor:
    """A plain tensor equal to `weight` bit for bit: a copy if it is packed, else itself."""
    packed = _packed(weight)
    return weight if packed is None else packed.to_dense()


def is_packed(weight: torch.Tensor) -> bool:
    return _packed(weight) is not None


def overwrite(weight: torch.Tensor, new: torch.Tensor) -> None:
    """Give a tensor, in place, the data of another of its kind, which is packed if it is."""
    packed = _packed(new)
    if packed is None:
        weight.copy_(new)
    else:
        weight._fgtp_packed = packed  # type: ignore[attr-defined]


def _packed(weight: torch.Tensor) -> torch.Tensor | None:
    packed: torch.Tensor | None = getattr(weight, "_fgtp_packed", None)
    return packed


def packable(graph: fx.Graph, positions: Collection[int]) -> frozenset[int]:
    """Those inputs at `positions` that the graph reads as weights of plain matmuls alone.

    Only tensors that can be packed here, and not under autocast, which our op does not know. The
    graph has fake values, as the rewriter leaves it.
    """
    if torch.is_autocast_enabled("cpu"):
        return frozenset()
    placeholders = graph.find_nodes(op="placeholder")
    weights = {position: placeholders[position] for position in positions}
    return frozenset(
        position
        for position, weight in weights.items()
        if supports(weight.meta["example_value"])
        and all(
            user.target is PLAIN or (user.target is F.linear and [*user.args].index(weight) == 1)
            for user in weight.users
        )
    )


def take_packed(module: fx.GraphModule, positions: Collection[int]) -> None:
    """Let the plain matmuls whose weights are the inputs at `positions` take these packed."""
    placeholders = module.graph.find_nodes(op="placeholder")
    for position in positions:
        for user in placeholders[position].users:
            if user.target is PLAIN:
                continue
            user.target = torch.ops.fgtp_pass.linear.default
    module.recompile()


def supports(weight: torch.Tensor) -> bool:
    """Whether oneDNN has the layout, and a faster matmul for it: on x86, with AVX2 or AVX-512."""
    mkldnn = torch.backends.mkldnn
    if weight.device.type != "cpu" or weight.dim() != 2 or not mkldnn.enabled:
        return False
    if not (torch.backends.cpu.get_cpu_capability().startswith("AVX") and mkldnn.is_available()):  # type: ignore[no-untyped-call]
        return False
    if weight.dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype is torch.float32

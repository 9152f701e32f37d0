"""What is known of a value: what it was made of, and what it flows into."""

from dataclasses import dataclass
from enum import Flag, auto

from torch import fx


@dataclass(frozen=True)
class Facts:
    """What is known of one value from the ops that made it.

    static: made of parameters and constants only.
    token_ids: integers that the caller gave, not computed.
    cores: attention cores it carries, no residual stream mixed in. A core is what mixes tokens:
    softmax(Q Kᵀ) V, a product of three activations (linear attention), a convolution.
    origin: the one matmul, lookup, core or input that it is a function of, besides statics.
    scores: carries a product of two activations (before a softmax); probs: the softmax of that.
    selected: its tokens were picked by data. chosen: computed from a topk or argmax.
    """

    static: bool = False
    token_ids: bool = False
    cores: frozenset[fx.Node] = frozenset()
    origin: fx.Node | None = None
    scores: bool = False
    probs: bool = False
    selected: bool = False
    chosen: bool = False


class Reach(Flag):
    """What a value flows into without another matmul or attention core in between."""

    NOTHING = 0
    ATTENTION = auto()
    MATMUL = auto()
    CHOICE = auto()
    OUTPUT = auto()


STATIC = Facts(static=True)

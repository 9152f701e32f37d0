"""What a path is worth: a tuple per path, added up over sites; the smallest wins."""

from collections.abc import Callable

from fgtp_pass.algebra.path import Path
from fgtp_pass.algebra.placement import Collective

Price = tuple[float, ...]
Pricing = Callable[[Path], Price]


def by_messages(path: Path) -> Price:
    """Without constants: the fewest messages, then the fewest bytes; decode waits for messages.

    Between equals the path with the fewest partial sums wins: it rounds like the unsharded model.
    """
    sums = (Collective.REDUCE_SCATTER, Collective.ALL_REDUCE)
    partial = sum(collective in sums for collective in path.collectives)
    return (len(path.collectives), path.bytes_per_token, partial)


def total(prices: list[Price]) -> Price:
    """The price of several paths together."""
    return tuple(map(sum, zip(*prices, strict=True)))

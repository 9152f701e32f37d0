"""Paths by predicted time."""

from collections.abc import Mapping

from fgtp_pass.algebra.price import Pricing
from fgtp_pass.cost.estimate import Cluster
from fgtp_pass.cost.path_seconds import path_seconds
from fgtp_pass.detect.match import Match
from fgtp_pass.graph.op_kinds import value_of
from fgtp_pass.plan.prices import BySite, Prices


def by_time(cluster: Cluster, sizes: Mapping[str, int], decode_batch: int) -> Prices:
    """Prices that are predicted seconds. sizes: by component. decode_batch: tokens per rank."""
    seconds = path_seconds(cluster)

    def at(tokens: int) -> BySite:
        def by_site(match: Match) -> Pricing:
            weight = value_of(match.parameters[0])
            size, dtype = sizes[match.component], str(weight.dtype).removeprefix("torch.")
            return lambda path: (seconds(path, tokens, size, dtype),)

        return by_site

    said = f"predicted time at {decode_batch} tokens per rank on {cluster.hardware.title}"
    return Prices(at, decode_batch, by_range=True, said=said)

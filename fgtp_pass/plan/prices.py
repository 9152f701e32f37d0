"""What the planner compares paths by, and when a site may move its weights in place of tokens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fgtp_pass.algebra.path import StageShape, legal_paths, sent_bytes
from fgtp_pass.algebra.placement import Collective
from fgtp_pass.algebra.price import Pricing, by_messages
from fgtp_pass.detect.match import Match

BySite = Callable[[Match], Pricing]


@dataclass(frozen=True)
class Prices:
    """What paths are compared by.

    at: by a number of tokens per rank, for each site its pricing; None where no constants are
    known: then the fewest messages win, then the fewest bytes, and a site moves its weights where
    these are fewer bytes than its tokens. decode_tokens: the number that weights are cut for.
    by_range: whether other numbers may take other paths, which may gather weights. gatherable: the
    sites whose weights a graph can gather. said: in words.
    """

    at: Callable[[int], BySite] | None = None
    decode_tokens: int = 1
    by_range: bool = False
    gatherable: Callable[[Match], bool] = lambda match: True
    said: str = "messages, then bytes"

    def by_site(self, tokens: int) -> BySite:
        return self.at(tokens) if self.at is not None else lambda match: by_messages

    def may_gather(
        self, match: Match, stages: Sequence[StageShape], group_size: int, tokens: int
    ) -> bool:
        """Whether a site's weights may be gathered in a step of so many tokens per rank.

        Without constants only where all of them together are fewer bytes than the tokens would be
        on the way that sends the fewest: then they are fewer messages too, and what they send can
        run ahead of the tokens.
        """
        if self.at is not None or not self.gatherable(match):
            return self.gatherable(match)
        own_part = sum(stage.weight_bytes or 0 for stage in stages) / group_size
        weights = sent_bytes(Collective.ALL_GATHER, own_part, group_size)
        by_tokens = (path for path in legal_paths(stages, group_size) if not path.gathers)
        return bool(weights < tokens * min(path.bytes_per_token for path in by_tokens))

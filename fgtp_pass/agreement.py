"""How the ranks of a group make sure that they do the same thing, before tensors move.

Before it shards weights, and before every step, a rank meets its group: all exchange a fixed-size
header, and more words only if something is not as usual. A rank that failed, that does something
else, or that has another number of tokens is so told to all in place of a hang.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
import torch.distributed as dist

from fgtp_pass.collectives import DataParallelGroup, hostname
from fgtp_pass.errors import AgreementError

log = logging.getLogger("fgtp_pass")

_HEADER_INTS = 64

# renamed in torch 2.13
_all_gather_flat = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Act(IntEnum):
    """What a rank has come to do."""

    SHARD = 1  # agree on a plan before weights are touched
    STEP = 2  # run a compiled graph
    IDLE = 3  # take part in a step without tokens of its own
    FAILED = 4  # tell the others why it cannot go on

    @property
    def doing(self) -> str:
        return {
            Act.SHARD: "compiles a graph and wants to agree on how to shard it",
            Act.STEP: "runs a step",
            Act.IDLE: "idles",
            Act.FAILED: "failed",
        }[self]


@dataclass(frozen=True)
class Card:
    """What one rank said at a meeting.

    rank: its rank in the data-parallel group. sites: a number that stands for the sites of its
    graph, in order. tokens: its token counts. words: what it said beyond the header.
    """

    rank: int
    act: Act
    sites: int
    tokens: tuple[int, ...]
    words: Any = None


class Council:
    """The ranks that meet: consecutive ranks of the data-parallel group, from `first_rank` on."""

    def __init__(self, group: dist.ProcessGroup, first_rank: int, timeout_seconds: float):
        self.group = group
        self.size = group.size()
        self.first_rank = first_rank
        self.timeout_seconds = timeout_seconds
        self._all = torch.zeros(self.size * _HEADER_INTS, dtype=torch.int64)

    def meet(
        self, act: Act, sites: int = 0, tokens: Sequence[int] = (), words: Any = None
    ) -> list[Card]:
        """Exchange cards; returns those of all ranks, in rank order.

        Raises AgreementError on every rank when one failed, when they came to do different
        things, or when one does not come within the timeout. Costs one all_gather of 512 bytes
        per rank when all came for a STEP.
        """
        header = [int(act), sites, len(tokens), *tokens]
        if len(header) > _HEADER_INTS:
            raise AgreementError(
                f"a graph with {len(tokens)} different token counts has more than the "
                f"{_HEADER_INTS - 3} that ranks can compare"
            )
        mine = torch.tensor(header + [0] * (_HEADER_INTS - len(header)), dtype=torch.int64)
        self._guarded(lambda: _all_gather_flat(self._all, mine, group=self.group))
        rows = self._all.view(self.size, _HEADER_INTS).tolist()
        cards = [
            Card(self.first_rank + i, Act(row[0]), row[1], tuple(row[3 : 3 + row[2]]))
            for i, row in enumerate(rows)
        ]
        if all(card.act is Act.STEP for card in cards):
            return cards
        return self._talk(cards, words)

    def meet_equal(self, mine: Mapping[str, Any]) -> None:
        """Raise AgreementError on every rank, with what each has, unless all have the same."""
        cards = self.meet(Act.SHARD, words=mine)
        for what in mine:
            said = {card.rank: card.words.get(what) for card in cards}
            if len({str(value) for value in said.values()}) > 1:
                listed = ", ".join(f"rank {rank} has {value}" for rank, value in said.items())
                raise AgreementError(
                    f"the data-parallel ranks differ in {what}: {listed}. "
                    "They must run the same model with the same options and libraries."
                )

    def _talk(self, cards: list[Card], words: Any) -> list[Card]:
        said: list[Any] = [None] * self.size
        self._guarded(lambda: dist.all_gather_object(said, words, group=self.group))
        cards = [
            Card(card.rank, card.act, card.sites, card.tokens, word)
            for card, word in zip(cards, said, strict=True)
        ]
        failed = [card for card in cards if card.act is Act.FAILED]
        if failed:
            raise AgreementError("; ".join(f"rank {c.rank} failed: {c.words}" for c in failed))
        acts = {card.act for card in cards}
        if len(acts) > 1 and acts != {Act.STEP, Act.IDLE}:
            listed = "; ".join(f"rank {card.rank} {card.act.doing}" for card in cards)
            raise AgreementError(
                f"the ranks of a group do different things: {listed}. They must call the compiled "
                "model (or idle_step) the same number of times, in the same order."
            )
        return cards

    def _guarded(self, exchange: Any) -> None:
        try:
            exchange()
        except RuntimeError as error:
            last = self.first_rank + self.size - 1
            raise AgreementError(
                f"not all of the data-parallel ranks {self.first_rank} to {last} came to this "
                f"step: one of them ended, or did not come within {self.timeout_seconds:g} s. "
                f"({str(error).splitlines()[0]})"
            ) from error


def wide_council(group: DataParallelGroup) -> Council:
    """All data-parallel ranks: they agree on plans."""
    return Council(group.control_group(group.size), 0, group.timeout.total_seconds())


def tell(council: Council, error: Exception) -> None:
    """Say why this rank fails, so that the others raise too; its own error stays the first."""
    try:
        council.meet(Act.FAILED, words=f"{type(error).__name__}: {error}")
    except AgreementError as met:
        log.debug("told the group: %s", met)


@contextmanager
def telling(council: Council | None) -> Iterator[None]:
    """Tell the ranks of the council if what is done here fails."""
    try:
        yield
    except Exception as error:
        if council is not None:
            tell(council, error)
        raise


_ranks_on_host: dict[DataParallelGroup, int] = {}


def ranks_on_smallest_host(group: DataParallelGroup) -> int:
    """How many ranks the smallest host of the group has, which bounds "auto".

    Collective the first time that it is asked of a group.
    """
    if group not in _ranks_on_host:
        hosts = [hostname()]
        if group.size > 1:
            cards = wide_council(group).meet(Act.SHARD, words=hosts[0])
            hosts = [card.words for card in cards]
        _ranks_on_host[group] = min(Counter(hosts).values())
    return _ranks_on_host[group]

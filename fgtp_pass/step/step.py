"""One compiled graph at run time: hand it the shards, and exchange token counts before it runs."""

import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fgtp_pass.agreement.control_group import ONE_AT_A_TIME, ControlGroup
from fgtp_pass.agreement.message import Intent, Message
from fgtp_pass.collectives.waits import listed
from fgtp_pass.errors import AgreementError, FgtpError, TokenCountError
from fgtp_pass.plan.plan import WeightCut
from fgtp_pass.plan.planner import PlannedSite
from fgtp_pass.rewrite.rewrite import MINIMUM_ROWS
from fgtp_pass.step.idle_program import IdleProgram
from fgtp_pass.step.token_counts import TokenCounter, TokenCounts
from fgtp_pass.weights.sharded_parameter import record_of


def sites_number(sites: Sequence[PlannedSite]) -> int:
    """A number that is equal on two ranks when they run the same sites in the same order."""
    text = "\n".join(site.site.model_dump_json() for site in sites)
    return zlib.crc32(text.encode())


def collectives_of(
    sites: Sequence[PlannedSite], gathered: Iterable[tuple[WeightCut, int]]
) -> tuple[str, ...]:
    """The collectives of a rewritten graph by name, in the order in which it runs them."""
    weights = [f"the gathering of {cut.fqn}" for cut, _ in gathered]
    moves = [
        f"the {collective} of {site.site.component} {site.site.weights[0].fqn}"
        for site in sites
        for collective in site.site.collectives
    ]
    return (*weights, *moves)


@dataclass(eq=False)
class Step:
    """What Dynamo calls in place of the graph.

    shards: the positions of sharded parameters among the inputs. packed: those of them that the
    graph takes packed. sites, collectives: a number for the sites, and what they run.
    control: the ranks that run in step. exchanges: whether they exchange token counts before each
    run. idle: runs this graph's collectives for a rank without tokens.
    """

    compiled: Callable[..., Any]
    shards: tuple[int, ...]
    packed: frozenset[int]
    counter: TokenCounter
    sites: int
    collectives: tuple[str, ...]
    control: ControlGroup
    exchanges: bool
    ragged: bool
    idle: IdleProgram

    def __call__(self, *args: Any) -> Any:
        with ONE_AT_A_TIME:
            return self._run(args)

    def _run(self, args: tuple[Any, ...]) -> Any:
        inputs = list(args)
        for position in self.shards:
            # The graph may be called with another layer's parameters (Dynamo shares code), so the
            # shard is the argument's own, not the one that was compiled with.
            record = record_of(inputs[position])
            assert record is not None, "Dynamo guards on the class of its inputs"
            inputs[position] = record.for_graph(position in self.packed)
        self.idle.remember(inputs, self.shards)
        if self.exchanges:
            inputs += self._agree(self.counter(args))
        with self.control.running(self.collectives):
            broken = self.counter.broken_guard(inputs) if self.ragged else None
            if broken is not None:
                raise FgtpError(
                    f"the compiled graph cannot run at these token counts: it needs {broken}. "
                    "Run torch.compiler.reset() on every rank, so that it is compiled again."
                )
            return self.compiled(*inputs)

    def _agree(self, counts: TokenCounts) -> list[torch.Tensor]:
        """Agree on the token counts of this run; the row counts to append to the inputs."""
        messages = self.control.exchange(
            Intent.STEP,
            payload=counts.sites,  # for a rank that idles
            sites=self.sites,
            counts=counts.number,
            tokens=counts.largest,
        )
        busy = [message for message in messages if message.intent is Intent.STEP]
        check_same_sites(busy)
        check_idle(messages, self.sites)
        if self.ragged:
            largest = largest_counts(busy)
            return [torch.empty(max(most, MINIMUM_ROWS), 0) for most in largest]
        if any(message.counts != counts.number for message in busy):
            raise TokenCountError(_counts_differ(self.counter.components, busy))
        return []


def largest_counts(messages: Sequence[Message]) -> list[int]:
    """By component, the largest count of any of these ranks."""
    return [max(column) for column in zip(*(m.tokens for m in messages), strict=True)]


def check_same_sites(messages: Sequence[Message]) -> None:
    """Raise AgreementError unless all of them run the same sites."""
    if len({message.sites for message in messages}) > 1:
        raise AgreementError(
            "the ranks of a group run graphs with different sites: "
            + ", ".join(f"rank {message.rank} graph {message.sites:08x}" for message in messages)
            + ". They must run the same model with the same features (cache, logits_to_keep)."
        )


def check_idle(messages: Sequence[Message], sites: int) -> None:
    """Raise AgreementError if a rank idles that has never run the sites that the others run now."""
    cannot = [
        message.rank
        for message in messages
        if message.intent is Intent.IDLE and sites not in message.payload
    ]
    if cannot:
        raise AgreementError(
            f"{listed(cannot)} cannot idle in this step: never ran the graph that the others run "
            f"({sites:08x}). Run one real step of every kind on every rank first (a warm-up)."
        )


def _counts_differ(components: Sequence[str], messages: Sequence[Message]) -> str:
    by_rank = []
    for message in messages:
        counts = ", ".join(
            f"{component} {count}"
            for component, count in zip(components, message.tokens, strict=True)
        )
        by_rank.append(f"rank {message.rank}: {counts}")
    same = len({message.tokens for message in messages}) == 1
    where = " at most, and differ at some sites of a component" if same else ""
    return (
        'tokens="equal" promises that all ranks of a group call with the same number of tokens, '
        f"but they came with ({'; '.join(by_rank)}){where}. Pad the batches to one size, or "
        'compile with options={"tokens": "ragged"}.'
    )

"""One compiled graph at run time: hand it the shards, and exchange token counts before it runs."""

import zlib
from collections.abc import Iterable, Sequence
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
from fgtp_pass.rewrite.whole_weights import gathered_parameters
from fgtp_pass.step.idle_inputs import IdleInputs
from fgtp_pass.step.program import Program, Programs
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
    names = [f"the gathering of {cut.fqn}" for cut, _ in gathered]
    whole = [site.cuts[p].fqn for site in sites for p in gathered_parameters(site)]
    started = taken = 0
    for site in sites:
        for _ in gathered_parameters(site):
            taken += 1  # the next one is on its way by then
            names += [f"the gathering of {fqn}" for fqn in whole[started : taken + 1]]
            started = taken + 1
        of = f"{site.site.component} {site.site.weights[0].fqn}"
        names += [f"the {collective.value} of {of}" for collective in site.path.collectives]
    return tuple(names)


@dataclass(eq=False)
class Step:
    """What Dynamo calls in place of the graph.

    programs: what runs, by number of tokens. shards: the positions of sharded parameters among the
    inputs. sites: a number for the sites. control: the ranks that run in step. exchanges: whether
    they exchange token counts before each run. idle: what this graph's collectives need for a rank
    without tokens.
    """

    programs: Programs
    shards: tuple[int, ...]
    counter: TokenCounter
    sites: int
    control: ControlGroup
    exchanges: bool
    ragged: bool
    idle: IdleInputs

    def __call__(self, *args: Any) -> Any:
        with ONE_AT_A_TIME:
            return self._run(args)

    def program(self, largest: Sequence[int]) -> Program:
        """What all ranks of the group run now. largest: by component, the most tokens of any."""
        key = self.programs.key(dict(zip(self.counter.components, largest, strict=True)))
        if key not in self.programs.made:
            with self.control.running([]):  # if it fails, the others hear of it
                self.programs.make(key)
        return self.programs.made[key]

    def _run(self, args: tuple[Any, ...]) -> Any:
        counts = self.counter(args)
        largest = self._agree(counts) if self.exchanges else counts.largest
        program = self.program(largest)
        inputs = list(args)
        for position in self.shards:
            # The graph may be called with another layer's parameters (Dynamo shares code), so the
            # shard is the argument's own, not the one that was compiled with.
            record = record_of(inputs[position])
            assert record is not None, "Dynamo guards on the class of its inputs"
            inputs[position] = record.for_graph(position in program.packed)
        self.idle.remember(inputs, self.shards)
        if self.ragged:
            inputs += [torch.empty(max(most, MINIMUM_ROWS), 0) for most in largest]
        with self.control.running(program.collectives):
            broken = program.guards.broken(inputs) if self.ragged else None
            if broken is not None:
                raise FgtpError(
                    f"the compiled graph cannot run at these token counts: it needs {broken}. "
                    "Run torch.compiler.reset() on every rank, so that it is compiled again."
                )
            return program.run(*inputs)

    def _agree(self, counts: TokenCounts) -> Sequence[int]:
        """Agree on the token counts of this run; by component, the most of any rank."""
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
        if not self.ragged and any(message.counts != counts.number for message in busy):
            raise TokenCountError(_counts_differ(self.counter.components, busy))
        return largest_counts(busy)


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

"""What ranks say to each other: what each has come to do, at which sites, with which tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from fgtp_pass.errors import AgreementError


class Intent(IntEnum):
    """What a rank has come to do."""

    SHARD = 1  # agree on a plan before weights are touched
    STEP = 2  # run a compiled graph
    IDLE = 3  # take part in a step without tokens of its own
    FAILED = 4  # tell the others why it cannot go on
    GATHER = 5  # put sharded weights together
    LOAD = 6  # load, save or update weights

    @property
    def doing(self) -> str:
        return {
            Intent.SHARD: "compiles a graph and wants to agree on how to shard it",
            Intent.STEP: "runs a step",
            Intent.IDLE: "idles",
            Intent.FAILED: "failed",
            Intent.GATHER: "puts sharded weights together (unshard, full_state_dict)",
            Intent.LOAD: "loads, saves or updates weights",
        }[self]

    @property
    def purpose(self) -> str:
        """What it waits for the others for."""
        return {
            Intent.SHARD: "to agree on a plan",
            Intent.STEP: "before a step",
            Intent.IDLE: "before an idle step",
            Intent.FAILED: "to tell why it failed",
            Intent.GATHER: "to put sharded weights together",
            Intent.LOAD: "to load, save or update weights",
        }[self]


@dataclass(frozen=True)
class Message:
    """What one rank said in an exchange.

    rank: its rank in the data-parallel group. sites: a number that stands for the sites of its
    graph, in order. counts: one that stands for the token counts at each of them. tokens: the
    largest of these by component. payload: what it said beyond that, picklable.
    """

    rank: int
    intent: Intent
    sites: int = 0
    counts: int = 0
    tokens: tuple[int, ...] = ()
    payload: Any = None


def require_one_purpose(messages: Sequence[Message]) -> None:
    """Raise AgreementError if a rank failed, or if they came to do different things.

    A step and an idle step are one thing.
    """
    failed = [message for message in messages if message.intent is Intent.FAILED]
    if failed:
        said = "; ".join(f"rank {m.rank} failed: {m.payload}" for m in failed)
        raise AgreementError(said, shared=True)
    intents = {message.intent for message in messages}
    if len(intents) > 1 and intents != {Intent.STEP, Intent.IDLE}:
        listed = "; ".join(f"rank {message.rank} {message.intent.doing}" for message in messages)
        raise AgreementError(
            f"the ranks of a group do different things: {listed}. They must call the compiled "
            "model (or idle_step) the same number of times, in the same order.",
            shared=True,
        )

"""What each rank does in a step outside the graph, known to the others before it is done.

In every step vLLM's ranks tell each other their token counts, in one all_reduce over the
data-parallel group. What a rank will do outside the graph (lm_head, lookups) rides on that message,
so nothing more is sent, and each rank knows how often, and at how many rows, it is to take part.
"""

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from fgtp_pass.collectives.groups import ComponentGroup
from fgtp_pass.errors import AgreementError


@dataclass(frozen=True)
class Work:
    """Of one rank in one step; of several ranks, the most that any of them does.

    requests: as many rows does each call of a drafter's lm_head have. logit_rows: of the call
    from whose logits tokens are sampled. prompt_calls: further calls, for logits of prompts.
    prompt_rows: of the largest of these. lookups: token ids that are embedded outside the graph,
    in one call.
    """

    requests: int = 0
    logit_rows: int = 0
    prompt_calls: int = 0
    prompt_rows: int = 0
    lookups: int = 0

    @classmethod
    def most(cls, works: Iterable["Work"]) -> "Work":
        return cls(*map(max, zip(*map(dataclasses.astuple, works), strict=True)))


# V2's drafters run as many dummy requests on an idle rank
IDLE = Work(requests=1)


class CurrentStep:
    """The step that this worker process is in.

    number: counts the steps. lookups: what takes part in the others' lookups, once they are known.
    """

    def __init__(self) -> None:
        self.number = 0
        self.lookups: list[Callable[[], None]] = []
        self._announced: Work | None = None
        self._of_all: list[Work] = []
        self._rank = 0

    def begin(self, work: Work) -> None:
        """Announce this rank's work in the message that follows."""
        self.number += 1
        self._announced, self._of_all = work, []

    @property
    def agreed(self) -> bool:
        """Whether the ranks know each other's work. Not while vLLM profiles, warms up or captures
        graphs, where all ranks do the same.
        """
        return bool(self._of_all)

    def of_group(self, group: ComponentGroup) -> Work | None:
        """What the ranks of a component group do in this step; None before they have agreed."""
        if not self.agreed:
            return None
        first = self._rank - group.rank
        return Work.most(self._of_all[first : first + group.size])

    def exchange(
        self, message: torch.Tensor, rank: int, all_reduce: Callable[[torch.Tensor], Any]
    ) -> None:
        """Sum vLLM's message, [fields, ranks] of int32, and ours below it, over the ranks.

        The first message of a step carries its work, later ones, of drafters, zeros.
        """
        fields = dataclasses.astuple(self._announced or Work())
        ours = torch.zeros(len(fields), message.shape[1], dtype=message.dtype)
        ours[:, rank] = torch.tensor(fields, dtype=message.dtype)
        both = torch.cat((message, ours.to(message.device)))
        all_reduce(both)
        message.copy_(both[: message.shape[0]])
        if self._announced is None:
            return
        said = both[message.shape[0] :].t().tolist()
        idles = not self._announced.lookups
        self._announced, self._rank, self._of_all = None, rank, [Work(*one) for one in said]
        if idles:
            for take_part in self.lookups:
                take_part()


STEP = CurrentStep()


class Calls:
    """The calls of one layer, outside the graph, in the current step."""

    def __init__(self, group: ComponentGroup):
        self._group = group
        self._step = 0
        self._made = 0

    @property
    def made(self) -> int:
        return self._made if self._step == STEP.number else 0

    @property
    def work(self) -> Work | None:
        return STEP.of_group(self._group)

    def count(self) -> None:
        self._made, self._step = self.made + 1, STEP.number


def rows_for_all(own: int, most: int | None, what: str) -> int:
    """At how many rows the ranks of a group do something. most: as far as they know.

    Raises AgreementError if this rank has more than it announced: others would wait without end.
    """
    if most is not None and own > most:
        raise AgreementError(
            f"this rank has {own} rows for {what} in this step, and the ranks of its group agreed "
            f"on {most}. Please report what was asked of the model."
        )
    return own if most is None else most


class Scheduled:
    """From what vLLM's scheduler hands to a worker, the rank's work.

    v2: whether the V2 model runner is to do it. sampled: tokens that a request samples at once.
    embeds: whether the runner embeds token ids itself. chunk: rows of the V2 runner's calls.
    """

    def __init__(self, v2: bool, sampled: int, embeds: bool, chunk: int):
        self._v2, self._sampled, self._embeds, self._chunk = v2, sampled, embeds, chunk
        self._prompts: dict[str, int] = {}  # of requests that ask for logits of their prompt

    def work(self, scheduled: Any) -> Work:
        """scheduled: a `SchedulerOutput`."""
        for name in scheduled.finished_req_ids:
            self._prompts.pop(name, None)
        for new in scheduled.scheduled_new_reqs:
            given = new.sampling_params
            asked = ("prompt_logprobs", "prompt_logprob_token_ids")
            if any(getattr(given, name, None) is not None for name in asked):
                self._prompts[new.req_id] = len(new.prompt_token_ids or ())
        running = scheduled.scheduled_cached_reqs
        for name, computed in zip(running.req_ids, running.num_computed_tokens, strict=True):
            if computed >= self._prompts.get(name, computed + 1):
                del self._prompts[name]
        tokens = scheduled.num_scheduled_tokens
        drafts = sum(map(len, scheduled.scheduled_spec_decode_tokens.values()))
        asking = [tokens[name] for name in self._prompts if name in tokens]
        calls, rows = len(asking), max(asking, default=0)
        if self._v2 and asking:  # over the whole batch, and over each request, in chunks
            parts = (sum(tokens.values()), *asking)
            calls, rows = sum(-(-n // self._chunk) for n in parts), min(parts[0], self._chunk)
        return Work(
            requests=len(tokens),
            logit_rows=len(tokens) * self._sampled + drafts,
            prompt_calls=calls,
            prompt_rows=rows,
            lookups=sum(tokens.values()) if self._embeds else 0,
        )

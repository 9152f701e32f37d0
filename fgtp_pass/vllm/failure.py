"""When a step fails: which rank is the cause, said on every rank that is left.

A rank that raises or dies breaks the connections of its groups, so the collectives of the others
fail at once; a rank that hangs is given up after the timeout of the groups. Either way the ranks
that are left tell each other through the store by which torch.distributed was set up.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from fgtp_pass.errors import AgreementError, first_line

_ANSWER_SECONDS = 5.0


@contextmanager
def naming_the_cause(what: str) -> Iterator[None]:
    """Raise AgreementError, with what every rank says of itself, for any error within."""
    try:
        yield
    except Exception as error:
        rank, world = dist.get_rank(), dist.get_world_size()
        mine = first_line(error)
        answers = _exchange(rank, world, mine)
        said = "; ".join(
            f"rank {other} said: {answers[other]}"
            if other in answers
            else f"rank {other} did not answer: it ended or hangs"
            for other in range(world)
            if other != rank
        )
        raise AgreementError(f"{what} failed on rank {rank}: {mine}; {said}.") from error


def _exchange(rank: int, world: int, mine: str) -> dict[int, str]:
    """What the ranks say of their failure, as far as they answer in time."""
    answers = {rank: mine}
    try:
        store = _get_default_store()
        store.set(f"fgtp_failure_{rank}", mine)
        deadline = time.monotonic() + _ANSWER_SECONDS
        while len(answers) < world and time.monotonic() < deadline:
            for other in set(range(world)) - answers.keys():
                if store.check([f"fgtp_failure_{other}"]):
                    answers[other] = store.get(f"fgtp_failure_{other}").decode()
            time.sleep(0.05)
    except dist.DistError:
        pass  # the store went with the rank that kept it, which then does not answer
    return answers

"""`idle_step`: a rank without tokens takes part in a step."""

from collections.abc import Iterable

from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from fgtp_pass.agreement.control_group import ONE_AT_A_TIME
from fgtp_pass.agreement.message import Intent
from fgtp_pass.errors import AgreementError
from fgtp_pass.rewrite.rewrite import MINIMUM_ROWS
from fgtp_pass.step.step import Step, check_idle, check_same_sites, largest_counts
from fgtp_pass.weights.state import sharded_parameters

# by sharded parameter: the compiled graphs that read it by the number of their sites, latest last
_steps = WeakIdKeyDictionary()


def note_step(step: Step, parameters: Iterable[nn.Parameter]) -> None:
    """Remember the step for `idle_step` as the latest one that reads these parameters."""
    for parameter in parameters:
        if parameter not in _steps:
            _steps[parameter] = {}
        steps = _steps[parameter]
        steps.pop(step.sites, None)
        steps[step.sites] = step


def idle_step(model: nn.Module) -> bool:
    """Take part in one step of the group without tokens of one's own.

    model: the compiled model, or the module that was compiled. Call it on a rank that has no
    requests while the others of its group run a step. Every rank must have run one real step
    before. Returns whether any of them ran one; False when the whole group idles. Raises
    AgreementError where that cannot work, on all ranks of the group.
    """
    by_parameter = [_steps[p] for p in sharded_parameters(model).values() if p in _steps]
    latest = dict.fromkeys([*steps.values()][-1] for steps in by_parameter)
    if not latest:
        raise AgreementError(
            "idle_step: this rank has no compiled step of this model. Run one real step on "
            "every rank first (a warm-up), so that all ranks shard the same weights."
        )
    known = {number: step for steps in by_parameter for number, step in steps.items()}
    with ONE_AT_A_TIME:
        # one for each graph that Dynamo splits the model into
        ran = [_idle(one, {n: s for n, s in known.items() if s.idle.ready}) for one in latest]
    return any(ran)


def _idle(latest: Step, known: dict[int, Step]) -> bool:
    """Run the sites that the others run now."""
    if not latest.exchanges:
        raise AgreementError(
            "idle_step needs the ranks to exchange counts before each step: compile with "
            "check_tokens=True."
        )
    messages = latest.control.exchange(Intent.IDLE, payload=frozenset(known))
    busy = [message for message in messages if message.intent is Intent.STEP]
    if not busy:
        return False  # the whole group idles
    check_same_sites(busy)
    check_idle(messages, busy[0].sites)
    step = known[busy[0].sites]
    counts, largest = busy[0].payload, largest_counts(busy)
    program = step.program(largest)
    if step.ragged:
        rows = dict(zip(step.counter.components, largest, strict=True))
        counts = [max(rows[component], MINIMUM_ROWS) for component in step.counter.of_site]
    with step.control.running(program.collectives):
        step.idle.run(program.idle, counts)
    return True

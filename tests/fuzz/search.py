"""Hypothesis looks for a case that goes wrong, and shrinks it."""

import re
from collections import Counter
from dataclasses import dataclass, field

from fuzz.compare import PATIENCE, judge
from fuzz.grammar import Case
from fuzz.programs import cases
from fuzz.source import source
from hypothesis import HealthCheck, Phase, given, reject, seed, settings
from ranks import Pool, RankTimeout

RANKS = 3
HANG = 4 * PATIENCE


class WrongError(AssertionError):
    """A case that goes wrong on some rank."""


@dataclass
class Seen:
    """What a search came across.

    passed_over: how many went wrong in another way than is looked for. sites: by component, how
    many were cut.
    """

    cases: int = 0
    invalid: int = 0
    passed_over: int = 0
    sites: Counter[str] = field(default_factory=Counter)


class Judge:
    """Runs cases on a pool of ranks, which is made anew when one hangs.

    only: a regular expression; what goes wrong with a message that has no match is passed over.
    """

    def __init__(self, only: str = "") -> None:
        self._only = re.compile(only)
        self._pool: Pool | None = None
        self.seen = Seen()

    def __call__(self, case: Case) -> None:
        """Raises WrongError; rejects what does not run without the pass."""
        try:
            self._run(case)
        except WrongError as error:
            if self._only.search(str(error)):
                raise
            self.seen.passed_over += 1

    def _run(self, case: Case) -> None:
        if self._pool is None or not self._pool.alive:
            self._pool = Pool(RANKS)
        self.seen.cases += 1
        try:
            verdicts = self._pool.run(judge, case, timeout=HANG)
        except RankTimeout as error:
            raise WrongError(f"it hangs: {error}") from None
        if any(verdict.invalid for verdict in verdicts):
            self.seen.invalid += 1
            reject()
        self.seen.sites.update(dict(verdicts[0].sites))
        wrong = [f"rank {r}: {v.wrong}" for r, v in enumerate(verdicts) if v.wrong]
        if wrong:
            raise WrongError("\n".join(wrong))

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()


def search(judge: Judge, number: int, examples: int) -> str:
    """Try cases of one seed; a report of the smallest that goes wrong, or an empty string."""
    smallest: dict[str, tuple[Case, str]] = {}

    @seed(number)
    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(cases())
    def try_case(case: Case) -> None:
        try:
            judge(case)
        except WrongError as error:
            smallest["it"] = case, str(error)
            raise

    try:
        try_case()
    except WrongError:
        case, wrong = smallest["it"]
        return f"{wrong}\n\n{describe(case)}"
    return ""


def describe(case: Case) -> str:
    """The case as text: how it is called, and the program's code."""
    called = f"{case.ranks} ranks, {case.contract}, dynamic={case.dynamic}, {case.inner}"
    called += ", six components" if case.six else ""
    shapes = [
        ", ".join(str(case.shape(call, rank) or "idle") for rank in range(case.ranks))
        for call in range(len(case.calls))
    ]
    return f"{case}\n\n# {called}; (batch, tokens) by rank: {'; then '.join(shapes)}\n" + source(
        case.program
    )

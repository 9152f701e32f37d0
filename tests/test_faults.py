"""Faults of one rank: each ends in the right numbers, or in an error that names rank and reason.

docs/reliability.md shows the matrix. `STAGES`: at the first call, in decode (a call after it), in a
ragged step. Nothing of it may hang: an error comes within `timeout_seconds` and a little.
"""

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from fuzz.grammar import Program
from fuzz.source import build
from marks import full
from process_faults import befall
from ranks import Outcome, Pool

import fgtp_pass
from fgtp_pass import fgtp_backend
from fgtp_pass.backend import runtime

TIMEOUT = 15.0
STAGES = ("first call", "decode", "ragged")
RIGHT = "right"  # the numbers of the plain model


@dataclass(frozen=True)
class Fault:
    """What happens to rank 1, and how the calls of ranks 0 and 1 end: RIGHT, or parts of the error.

    rank 1's is None where its process is gone or stopped. after: whether both ranks can go on.
    """

    first: tuple[str, ...] | str
    second: tuple[str, ...] | str | None
    after: bool = False


def _ended(what: str) -> Fault:
    return Fault(("AgreementError", f"rank 1 {what}"), None)


AWAY = ("AgreementError", "rank 1 did not come within 15 s")
FAULTS: dict[str, dict[str, Fault]] = {
    "kill -9": {
        "first call": Fault(AWAY, None),
        "decode": _ended("ended"),
        "ragged": _ended("ended"),
    },
    "SIGSTOP": dict.fromkeys(STAGES, Fault(AWAY, None)),
    "exception in user code": {
        "first call": Fault(AWAY, ("ValueError", "mine"), after=True),
        "decode": Fault(AWAY, ("ValueError", "mine"), after=True),
        "ragged": Fault(AWAY, ("ValueError", "mine"), after=True),
    },
    "exception in the inner backend": dict.fromkeys(
        STAGES, Fault(("AgreementError", "rank 1 failed", "inner"), ("inner",), after=True)
    ),
    "exit": {
        "first call": Fault(AWAY, None),
        "decode": _ended("ended"),
        "ragged": _ended("ended"),
    },
    "slow": dict.fromkeys(STAGES, Fault(RIGHT, RIGHT, after=True)),
    "wrong weights": dict.fromkeys(
        STAGES,
        Fault(
            ("AgreementError", "rank 1 differs from rank 0 in table.weight"),
            ("AgreementError", "rank 1 differs from rank 0 in table.weight"),
            after=True,
        ),
    ),
    "wrong options": dict.fromkeys(
        STAGES,
        Fault(
            ("AgreementError", "differ in check_tokens: rank 0 has True; rank 1 has False"),
            ("AgreementError", "differ in check_tokens: rank 0 has True; rank 1 has False"),
            after=True,
        ),
    ),
    "wrong library version": dict.fromkeys(
        STAGES,
        Fault(
            ("AgreementError", "differ in torch: ", "rank 1 has 1.0"),
            ("AgreementError", "differ in torch: ", "rank 1 has 1.0"),
            after=True,
        ),
    ),
    "wrong token count": {
        **dict.fromkeys(
            ("first call", "decode"),
            Fault(
                ("TokenCountError", "rank 0: ", "rank 1: "),
                ("TokenCountError", "rank 0: ", "rank 1: "),
                after=True,
            ),
        ),
        "ragged": Fault(RIGHT, RIGHT, after=True),
    },
    "missing idle step": dict.fromkeys(STAGES[1:], Fault(AWAY, RIGHT, after=True)),
}
CELLS = [(fault, stage) for fault, stages in FAULTS.items() for stage in stages]


# These show when a model is compiled, the others when it is called.
AT_COMPILE = ("wrong weights", "wrong options", "wrong library version")


def _cell(fault: str, stage: str, goes_on: bool) -> tuple[str, str]:
    """In a rank: how the hurt call ended, and how the next ones did."""
    mine = dist.get_rank() == 1
    hurt = [False]

    def inner(gm: Any, inputs: Any) -> Any:
        def run(*args: Any) -> Any:
            if hurt[0]:
                raise RuntimeError("inner")
            return gm.forward(*args)

        return run

    options = {
        "finegrained_tp_config": {"embedding_tensor_parallel_size": 2},
        "inner_backend": inner,
        "timeout_seconds": TIMEOUT,
        "tokens": "ragged" if stage == "ragged" else "equal",
    }
    plain = build(Program())

    def compiled(**changes: Any) -> Any:
        return torch.compile(build(Program()), backend=fgtp_backend, options={**options, **changes})

    @torch.no_grad()
    def call(fast: Any, length: int = 4) -> None:
        ids = torch.randint(50, (2, length), generator=torch.Generator().manual_seed(length))
        assert torch.allclose(fast(ids), plain(ids), atol=1e-9), "other numbers"

    def hurt_call(fast: Any) -> None:
        if mine:
            befall(fault)
        match fault if mine else "":
            case "exception in the inner backend":
                hurt[0] = True
            case "missing idle step":
                return
            case "wrong weights":
                with torch.no_grad():
                    fast._orig_mod.table.weight[0, 0] += 1
            case "wrong options":
                fast = compiled(check_tokens=False)
            case "wrong library version":
                versions = {**runtime.library_versions(), "torch": "1.0"}
                with mock.patch.object(runtime, "library_versions", return_value=versions):
                    return call(fast)
        call(fast, 5 if mine and fault == "wrong token count" else 4)

    fast = compiled()
    if stage != "first call":
        call(fast)
    if stage != "first call" and fault in AT_COMPILE:
        torch._dynamo.reset()
        fast = compiled()
    ended = RIGHT
    try:
        hurt_call(fast)
    except Exception as error:
        ended = f"{type(error).__name__}: {error}"
    if not goes_on:
        return ended, ""
    hurt[0] = False
    if mine and fault in ("exception in user code", "missing idle step"):
        time.sleep(TIMEOUT + 6)  # until rank 0 has given up
    if fault in AT_COMPILE:
        fast = compiled()
    again = ""
    for _ in range(3):
        try:
            call(fast)
            fgtp_pass.unshard(fast)
            call(fast)
            return ended, RIGHT
        except fgtp_pass.AgreementError as error:
            again = str(error)
    return ended, again


@pytest.fixture
def pair() -> Iterator[Pool]:
    """Two ranks of a test's own, since one of them may not survive it."""
    pool = Pool(2, method="forkserver")
    yield pool
    pool.kill()


def _as_said(outcome: Outcome, said: tuple[str, ...] | str, goes_on: bool) -> None:
    assert not outcome.error, outcome.trace or outcome.error
    ended, again = outcome.value
    for part in (said,) if isinstance(said, str) else said:
        assert part in ended
    assert not goes_on or again == RIGHT


@pytest.mark.parametrize(
    ("fault", "stage"),
    [pytest.param(fault, stage, marks=() if stage == "decode" else full) for fault, stage in CELLS],
)
def test_a_fault_ends_as_the_matrix_says(pair: Pool, fault: str, stage: str) -> None:
    cell = FAULTS[fault][stage]
    gone = cell.second is None
    first, *second = pair.outcomes(_cell, fault, stage, cell.after, awaited=[0] if gone else None)
    _as_said(first, cell.first, cell.after)
    if cell.second is not None:
        _as_said(second[0], cell.second, cell.after)


def test_the_matrix_is_documented() -> None:
    page = (Path(__file__).parents[1] / "docs" / "reliability.md").read_text()
    rows = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    assert sorted(rows) == sorted(FAULTS)

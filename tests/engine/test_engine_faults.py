"""The columns of the fault matrix that are vLLM's: something befalls the worker of rank 1.

docs/reliability.md shows the matrix. "first call" is the start of the engines, where ranks meet;
"decode" a step in which all have requests; "ragged" one in which rank 1 idles. Every fault ends in
the tokens of one unsharded rank, or in an error on rank 0 that names rank 1 and the reason.
"""

from __future__ import annotations

import functools
import json
import os
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import zoo
from engines import TWO_STAGES, WARMED_UP, Answer, Engines, Job, merged, shared, start
from faults import Fault, happened, is_over
from fork_server import Fork, ForkServer, session
from marks import full
from openai import APIError, OpenAI
from random_checkpoints import CHECKPOINTS, Checkpoints, prompts
from ranks import HANG, free_port
from servers import serving
from test_faults import FAULTS

TIMEOUT = 20.0
GRACE = 15.0  # seconds: for what rank 0 asks of the others, and on a busy machine
ENDS = 120.0  # seconds: for all processes of a server to end
OWN = {0: (0,), 1: (1, 2)}  # the prompts of each rank
LONG = {"prompts": prompts(3), "sampling": {"max_tokens": 60}}
RIGHT = "right"  # the tokens of one unsharded rank


LATE = "did not come within 20 s"
IN_VAIN = r"rank 0 waited \d+ s in a step, in vain: rank 1"

# by fault, the stage in which it is tried, and what the log of rank 0 says
SPMD = {
    "kill -9": ("decode", f"{IN_VAIN} ended"),
    "SIGSTOP": ("ragged", f"{IN_VAIN} {LATE}"),
    "exit": ("first call", f"rank 1 {LATE}"),
    "exception in user code": ("decode", f"{IN_VAIN} failed: ValueError: mine"),
    "slow": ("ragged", RIGHT),
    "wrong weights": ("first call", "differ in checkpoint: rank 0 has .*; rank 1 has"),
    "wrong options": ("first call", "differ in max_num_seqs: rank 0 has 8; rank 1 has 7"),
    "wrong library version": ("first call", "differ in torch: rank 0 has .*; rank 1 has 1.0"),
    "wrong token count": ("decode", "rank 1 failed: AgreementError: this rank has 2 rows"),
}
SERVED = SPMD | {
    "SIGSTOP": ("decode", f"{IN_VAIN} {LATE}"),
    # `vllm serve` ends all engines as soon as one has ended, before rank 0 gives up
    "exit": ("first call", r"\(EngineCore_DP1 .* EngineCore failed to start"),
    "slow": ("decode", RIGHT),
}


def faults(*kept: str) -> list[Any]:
    """All faults as parameters, `full` but for those kept."""
    return [pytest.param(fault, marks=() if fault in kept else full) for fault in SPMD]


@pytest.fixture
def fault_file(tmp_path: Path) -> Path:
    return tmp_path / "fault"


def _fault(name: str, stage: str, folder: Path) -> Fault:
    """What befalls rank 1; writes the other checkpoint that it may need."""
    at = {"first call": "start", "decode": "message", "ragged": "step"}[stage]
    if name != "wrong weights":
        return Fault(name, at)
    other = folder / "other"
    zoo.build("llama", seed=1, **CHECKPOINTS["llama"].overrides).save_pretrained(other)
    return Fault(name, at, model=str(other))


def _sampling(tokens: int) -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)


def _until_it_ends(
    file: Path, fault: Fault, tokens: dict[int, int], jobs: list[Job], port: int
) -> Any:
    """In a rank: its tokens, by the number of the prompt, or the error that ended it, with when.

    tokens: to make of each prompt, by rank. Rank 0 asks for the fault, in its fifth step: rank 1 is
    done with 2 tokens by then.
    """
    rank = int(os.environ["FGTP_TEST_RANK"])
    job = jobs[rank]
    try:
        engine = start(job, rank, len(jobs), port).llm_engine
        for i, ids in job.prompts.items():
            engine.add_request(str(i), {"prompt_token_ids": list(ids)}, _sampling(tokens[rank]))
        found: dict[int, list[int]] = {}
        step = 0
        while engine.has_unfinished_requests():
            step += 1
            if rank == 0 and step == 5 and fault.at != "start":
                fault.ask(file)
            for out in engine.step():
                if out.finished:
                    found[int(out.request_id)] = list(out.outputs[0].token_ids)
        return found
    except Exception as error:
        return f"{type(error).__name__}: {error}", time.time()


@pytest.mark.parametrize(
    "fault", faults("kill -9", "exception in user code", "wrong weights", "wrong token count")
)
def test_spmd(
    engines: Callable[[int], Engines],
    checkpoint: Checkpoints,
    unsharded: Callable[..., Answer],
    fault_file: Path,
    tmp_path: Path,
    fault: str,
) -> None:
    stage, said = SPMD[fault]
    what = _fault(fault, stage, tmp_path)
    if what.at == "start":
        what.ask(fault_file)
    given = prompts()
    tokens = {0: 60, 1: 2 if stage == "ragged" else 60}
    jobs = [
        Job(
            checkpoint("llama"),
            {i: given[i] for i in own},
            shared(fgtp_options={"timeout_seconds": TIMEOUT}),
            {"FGTP_TEST_FAULT": str(fault_file)},
            processes="fork",
        )
        for own in OWN.values()
    ]
    pool = engines(2)
    stopped = fault == "SIGSTOP"  # vLLM waits for its own worker longer than for the others
    run = pool.outcomes(
        functools.partial(_until_it_ends, fault_file, what, tokens),
        jobs,
        free_port(),
        awaited=[0] if stopped else None,
    )
    for outcome in run:
        assert not outcome.error, outcome.trace
    if said == RIGHT:
        want = unsharded("llama", LONG)
        for rank, outcome in enumerate(run):
            assert outcome.value == {i: want.tokens[i][: tokens[rank]] for i in OWN[rank]}
        assert happened(fault_file)
        return
    assert re.search(said, pool.log(0)), (run[0].value, pool.log(0)[-8000:])
    for rank, outcome in enumerate(run):
        assert isinstance(outcome.value, tuple), (rank, outcome.value)
        took = outcome.value[1] - happened(fault_file)
        print(f"{fault}, {stage}: rank {rank} after {took:.1f} s: {outcome.value[0]}")
        assert took < TIMEOUT + GRACE, (rank, outcome.value)


@full
def test_a_first_pipeline_stage(
    engines: Callable[[int], Engines], checkpoint: Checkpoints, fault_file: Path
) -> None:
    """The engine does not hear of its errors, and the last stage waits for it."""
    options = merged(shared(fgtp_options={"timeout_seconds": TIMEOUT}), TWO_STAGES)
    environment = {"FGTP_TEST_FAULT": str(fault_file)} | WARMED_UP
    jobs = [
        Job(
            checkpoint("llama"),
            {i: prompts()[i] for i in own},
            options,
            environment,
            processes="fork",
        )
        for own in OWN.values()
    ]
    what = Fault("exception in user code", "message", stage=0)
    pool, tokens = engines(2), {0: 60, 1: 60}
    run = functools.partial(_until_it_ends, fault_file, what, tokens)
    outcomes = pool.outcomes(run, jobs, free_port())
    assert re.search(rf"PP0 .*{IN_VAIN} failed: ValueError: mine", pool.log(0)), pool.log(0)[-8000:]
    assert re.search(r"PP0 .*ValueError: mine", pool.log(1)), pool.log(1)[-8000:]
    for rank, outcome in enumerate(outcomes):
        assert not outcome.error, outcome.trace
        took = outcome.value[1] - happened(fault_file)
        print(f"rank {rank} after {took:.1f} s: {outcome.value[0]}")
        assert took < TIMEOUT + GRACE


@pytest.mark.parametrize("fault", faults("kill -9"))
def test_serve(
    server: Callable[..., ForkServer],
    checkpoint: Checkpoints,
    unsharded: Callable[..., Answer],
    fault_file: Path,
    tmp_path: Path,
    fault: str,
) -> None:
    """Requests end in an error, the log names rank 1, and the server and all its processes end."""
    stage, said = SERVED[fault]
    what = _fault(fault, stage, tmp_path)
    if what.at == "start":
        what.ask(fault_file)
    model, given = checkpoint("llama"), prompts()
    config = shared(fgtp_options={"timeout_seconds": TIMEOUT})["additional_config"]
    arguments = ("--data-parallel-size", "2", "-cc.passes=fgtp")
    arguments += ("--additional-config", json.dumps(config))
    environment = {"FGTP_TEST_FAULT": str(fault_file)}
    comes_up = what.at != "start"
    with serving(
        server(), tmp_path / "served", model, *arguments, environment=environment, answers=comes_up
    ) as served:
        started = {i: threading.Semaphore(0) for i in given}

        def ask(i: int, rank: int) -> tuple[list[int], str, float]:
            """The last of some streams: one that fails, or that nothing happens to."""
            client = OpenAI(base_url=served.url, api_key="none", timeout=HANG, max_retries=0)
            while True:
                tokens: list[int] = []
                try:
                    for part in client.completions.create(
                        model=model, prompt=given[i], max_tokens=60, stream=True, temperature=0,
                        extra_body={"ignore_eos": True, "return_token_ids": True},
                        extra_headers={"X-data-parallel-rank": str(rank)},
                    ):  # fmt: skip
                        if part.choices:
                            tokens += part.choices[0].token_ids
                        started[i].release()
                except (APIError, httpx.HTTPError) as caught:
                    return tokens, f"{type(caught).__name__}: {caught}", time.time()
                if is_over(fault_file):
                    long_ago = time.time() - happened(fault_file) > TIMEOUT + GRACE
                    if said == RIGHT or long_ago:
                        return tokens, "", time.time()

        running = [Fork(p.pid) for p in session(served.process.pid)]
        if not comes_up:
            while not is_over(fault_file):
                time.sleep(0.1)
            running = [Fork(p.pid) for p in session(served.process.pid)]
        running.remove(served.process)  # which goes on as a process of these tests
        answers = {}
        with ThreadPoolExecutor() as pool:
            if comes_up:
                answers = {i: pool.submit(ask, i, rank) for rank in OWN for i in OWN[rank]}
                for i in [*answers] * 5:
                    while not started[i].acquire(timeout=1.0):
                        assert not answers[i].done(), answers[i].result()
                what.ask(fault_file)
        if said == RIGHT:
            want = unsharded("llama", LONG)
            for i, answer in answers.items():
                assert answer.result()[:2] == (want.tokens[i], "")
            assert happened(fault_file)
            return
        for i, answer in answers.items():
            _, error, when = answer.result()
            took = when - happened(fault_file)
            print(f"{fault}, {stage}: request {i} after {took:.1f} s: {error}")
        served.wait_until_over(ENDS)
        if fault == "SIGSTOP":  # the engine of the stopped worker may wait for it for minutes
            running = []
        for process in running:
            process.join(ENDS)
        left = [process for process in running if process.is_alive()]
        print(f"{fault}, {stage}: ended after {time.time() - happened(fault_file):.1f} s")
        log = served.log.read_text()
    assert not left, log[-8000:]
    assert re.search(said, log), log[-8000:]
    for answer in answers.values():
        _, error, when = answer.result()
        assert error
        assert when - happened(fault_file) < TIMEOUT + GRACE


def test_the_columns_are_documented() -> None:
    """A fault that no cell is of has a dash in both columns."""
    page = (Path(__file__).parents[2] / "docs" / "reliability.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| `")]
    matrix = {row[0].strip("`"): row[5:] for row in rows if len(row) == 7}
    assert [fault for fault, vllm in matrix.items() if vllm != ["-", "-"]] == list(SPMD)
    assert sorted(matrix) == sorted(FAULTS)

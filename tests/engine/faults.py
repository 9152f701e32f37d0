"""Faults of one rank's worker, for tests/test_faults.py's matrix in vLLM.

A test asks for one in the file that FGTP_TEST_FAULT names. It befalls the rank once: at "start",
when it is about to load the model, before the ranks meet; at a "message", before it tells the
others its token count in vLLM's own message; or in a "step", before the first collective of the
model.
"""

from __future__ import annotations

import functools
import json
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

from process_faults import befall
from ranks import HANG


@dataclass(frozen=True)
class Fault:
    """name: as in the matrix. at: "start", "message" or "step". stage: of the rank's pipeline.

    model: another checkpoint, if it needs one.
    """

    name: str
    at: str
    rank: int = 1
    stage: int = 0
    model: str = ""

    def ask(self, file: Path) -> None:
        """Let it happen from now on."""
        new = file.with_suffix(".new")
        new.write_text(json.dumps(asdict(self)))
        new.rename(file)


def is_over(file: Path) -> bool:
    """Whether it has happened."""
    return file.with_suffix(".happened").exists()


def happened(file: Path) -> float:
    """When it did, in seconds of `time.time`."""
    return float(file.with_suffix(".happened").read_text())


def _due(at: str, rows: int = 2) -> Fault | None:
    """The fault that befalls this worker now. rows: that it is about to tell; a wrong count of them
    is one less than two, since of an idle rank it would be none.
    """
    from vllm.distributed.parallel_state import get_dp_group, get_pp_group

    file = Path(os.environ["FGTP_TEST_FAULT"])
    if not file.exists() or is_over(file):
        return None
    fault = Fault(**json.loads(file.read_text()))
    here = (get_dp_group().rank_in_group, get_pp_group().rank_in_group)
    if fault.at != at or (fault.rank, fault.stage) != here:
        return None
    if fault.name == "wrong token count" and rows != 2:
        return None
    file.with_suffix(".happened").write_text(str(time.time()))
    return fault


def install() -> None:
    """Runs in every process of vLLM; only workers load models."""
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    stock = BaseModelLoader.load_model
    if hasattr(stock, "fgtp_fault"):
        return

    @functools.wraps(stock)
    def load_model(self: Any, vllm_config: Any, model_config: Any, *args: Any, **more: Any) -> Any:
        _befall(_due("start"), vllm_config, model_config)
        model = stock(self, vllm_config, model_config, *args, **more)
        forward = model.forward

        def step(*args: Any, **kwargs: Any) -> Any:
            _befall(_due("step"))
            return forward(*args, **kwargs)

        model.forward = step
        return model

    load_model.fgtp_fault = True  # type: ignore[attr-defined]
    BaseModelLoader.load_model = load_model
    _befall_at_messages()


def _befall(fault: Fault | None, vllm_config: Any = None, model_config: Any = None) -> None:
    if fault is None:
        return
    befall(fault.name)
    match fault.name:
        case "late":  # no row of the matrix
            time.sleep(HANG)
        case "wrong weights":
            model_config.model = fault.model
        case "wrong options":
            vllm_config.scheduler_config.max_num_seqs -= 1
        case "wrong library version":
            from fgtp_pass.vllm import build_model

            versions = {**build_model.library_versions(), "torch": "1.0"}
            mock.patch.object(build_model, "library_versions", return_value=versions).start()


def _befall_at_messages() -> None:
    """A "wrong token count" is one row less for lm_head than there is."""
    from fgtp_pass.vllm.work import Scheduled

    stock = Scheduled.work

    def work(self: Any, scheduled: Any) -> Any:
        said = stock(self, scheduled)
        fault = _due("message", said.logit_rows)
        if fault is not None and fault.name == "wrong token count":
            return replace(said, logit_rows=said.logit_rows - 1)
        _befall(fault)
        return said

    Scheduled.work = work  # type: ignore[method-assign]

""" "auto" with a declared decode batch or objective: the cost model's sizes, on real ranks."""

import logging
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import tomli_w
import torch
import torch.distributed as dist
import zoo
from decoding import prompts, relative_errors
from ranks import Pools

import fgtp_pass
from fgtp_pass import ConfigError, fgtp_backend
from fgtp_pass.algebra.placement import Collective
from fgtp_pass.calibration import measure
from fgtp_pass.cost.hardware import Constant, Hardware, load
from fgtp_pass.options.options import parse_options
from fgtp_pass.plan.plan import Plan


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"objective": "latency"}, "needs decode_batch"),
        ({"objective": "balanced"}, "needs decode_batch"),
        ({"objective": "speed", "decode_batch": 4}, "'objective'"),
        ({"decode_batch": 0}, "'decode_batch'"),
        ({"decode_batch": True}, "'decode_batch'"),
        ({"decode_batch": 4, "hardware": "h2000"}, "Did you mean 'h200'?"),
    ],
)
def test_bad_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_options(options)
    assert said in str(caught.value)


def profile(folder: Path, latency: float, bandwidth: float = 1e9) -> str:
    """A machine of slow memory, with collectives of this latency in seconds."""
    device = load("h100-sxm")
    time = device.within_node.all_gather.model_copy(
        update={
            "base_seconds": latency,
            "seconds_per_peer": 0.0,
            "bytes_per_second": 1e12,
            "small": None,
        }
    )
    kinds = [kind.value for kind in Collective]
    link = device.within_node.model_copy(update=dict.fromkeys(kinds, time))
    slow = Constant(value=bandwidth, source="made up")
    made = device.model_copy(
        update={"memory_bandwidth": slow, "within_node": link, "across_nodes": link}
    )
    path = folder / f"made-up-{latency}.toml"
    path.write_text(tomli_w.dumps(made.model_dump(exclude_none=True)))
    assert load(str(path)) == Hardware.model_validate(made.model_dump())
    return str(path)


@torch.no_grad()
def _run(cache: str, name: str = "llama", **options: Any) -> tuple[str | None, list[str]]:
    """The applied plan as JSON and what was logged, of a model that still computes the same."""
    os.environ["FGTP_CACHE_DIR"] = cache
    said: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    logger, handler = logging.getLogger("fgtp_pass"), Keep()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    few = mock.patch.multiple(measure, _REPETITIONS=3, _WARMUP=1)  # any constants will do
    try:
        few.start()
        model = zoo.build(name)
        ids = prompts(dist.get_rank(), 2, 4, model.config.vocab_size)
        want = model(input_ids=ids).logits
        fast = torch.compile(
            model, backend=fgtp_backend, options={"inner_backend": "eager", **options}
        )
        assert relative_errors(fast(input_ids=ids).logits, want)[0] < 1e-5
        plan = fgtp_pass.applied_plan(fast)
        return (plan.to_json() if plan else None), said
    finally:
        few.stop()
        logger.removeHandler(handler)


def test_slow_collectives_leave_the_model_whole(ranks: Pools, tmp_path: Path) -> None:
    hardware = profile(tmp_path, latency=1.0)
    outcomes = ranks(2).run(_run, str(tmp_path), decode_batch=4, hardware=hardware)
    assert [plan for plan, _ in outcomes] == [None, None]
    assert any("oproj: off, every size loses time, 2 least" in line for line in outcomes[0][1])


def test_what_pays_is_sharded_and_the_plan_says_why(ranks: Pools, tmp_path: Path) -> None:
    hardware = profile(tmp_path, latency=1e-9)
    options = {"decode_batch": 4, "hardware": hardware, "objective": "latency"}
    outcomes = ranks(2).run(_run, str(tmp_path), **options)
    plans = [Plan.from_json(plan) for plan, _ in outcomes if plan is not None]
    assert len(plans) == 2
    assert plans[0] == plans[1]
    chosen = {choice.component: choice for choice in plans[0].chosen}
    assert {name: choice.size for name, choice in chosen.items()} == {
        "oproj": 2,
        "mlp": 2,
        "lmhead": 2,
        "qkv": 2,
        "embedding": 1,  # a lookup reads its rows only: nothing to gain
    }
    assert "the fastest size" in chosen["mlp"].reason
    assert chosen["mlp"].reason in str(plans[0])


def test_memory_takes_what_frees_most_even_at_a_loss(ranks: Pools, tmp_path: Path) -> None:
    hardware = profile(tmp_path, latency=1.0)
    outcomes = ranks(2).run(_run, str(tmp_path), objective="memory", hardware=hardware)
    plan = Plan.from_json(outcomes[0][0])
    assert {choice.size for choice in plan.chosen} == {2}
    assert {site.component for site in plan.sites} == {"oproj", "mlp", "lmhead", "embedding", "qkv"}


def test_a_tied_weight_gets_one_size(ranks: Pools, tmp_path: Path) -> None:
    hardware = profile(tmp_path, latency=1e-9)
    outcomes = ranks(2).run(
        _run, str(tmp_path), "gemma2", decode_batch=1, hardware=hardware, objective="latency"
    )
    plan = Plan.from_json(outcomes[0][0])
    sizes = {choice.component: choice.size for choice in plan.chosen}
    assert sizes["embedding"] == sizes["lmhead"] == 2


def test_an_explicit_size_is_not_chosen(ranks: Pools, tmp_path: Path) -> None:
    hardware = profile(tmp_path, latency=1.0)
    config = {"mlp_tensor_parallel_size": 2, "oproj_tensor_parallel_size": "auto"}
    options = {"decode_batch": 4, "hardware": hardware, "finegrained_tp_config": config}
    outcomes = ranks(2).run(_run, str(tmp_path), **options)
    plan = Plan.from_json(outcomes[0][0])
    assert {site.component for site in plan.sites} == {"mlp"}
    assert [(choice.component, choice.size) for choice in plan.chosen] == [("oproj", 1)]


def test_this_machine_is_measured_once(ranks: Pools, tmp_path: Path) -> None:
    first = ranks(2).run(_run, str(tmp_path), decode_batch=4)
    assert any("measuring the machine" in line for line in first[0][1])
    (kept,) = tmp_path.glob("calibration-*.json")
    measured = Hardware.model_validate_json(kept.read_text())
    assert measured.calibration is not None
    assert measured.calibration.spread
    again = ranks(2).run(_run, str(tmp_path), decode_batch=3)
    assert any("measured" in line and "ago" in line for line in again[0][1])
    assert not any("measuring the machine" in line for line in again[0][1])
    anew = ranks(2).run(_run, str(tmp_path), decode_batch=2, hardware="measure")
    assert any("measuring the machine" in line for line in anew[0][1])


@torch.no_grad()
def _different(cache: str, hardware: str) -> None:
    _run(cache, "llama" if dist.get_rank() == 0 else "mixtral", decode_batch=4, hardware=hardware)


def test_ranks_that_see_other_components(ranks: Pools, tmp_path: Path) -> None:
    hardware = profile(tmp_path, latency=1e-9)
    for outcome in ranks(2).outcomes(_different, str(tmp_path), hardware):
        assert outcome.error == "AgreementError"
        assert "see different components" in outcome.message

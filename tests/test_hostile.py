"""What users do that no model does: autocast, modes, threads, waits, rounds without end."""

import gc
import logging
import threading
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
import zoo
from decoding import prompts, relative_errors, sizes
from fuzz.grammar import Program
from fuzz.source import build
from marks import quick
from ranks import Pools
from torch import nn

import fgtp_pass
from fgtp_pass import fgtp_backend
from fgtp_pass.weights.sharded_parameter import ShardedParameter


def compiled(model: nn.Module, **options: Any) -> Any:
    given = {"finegrained_tp_config": sizes(2), "inner_backend": "eager", **options}
    return torch.compile(model, backend=fgtp_backend, options=given)


@torch.no_grad()
def step(model: Any, length: int = 6, batch: int = 2) -> torch.Tensor:
    config = getattr(model, "_orig_mod", model).config
    ids = prompts(dist.get_rank(), batch, length, config.vocab_size)
    return model(input_ids=ids, use_cache=False).logits


def _autocast(name: str, tokens: str, dtype: torch.dtype) -> tuple[float, bool]:
    model = zoo.build(name)
    with torch.autocast("cpu", dtype):
        want = step(model)
        fast = compiled(model, tokens=tokens)
        got = step(fast)
        if tokens == "ragged":
            fgtp_pass.idle_step(fast) if dist.get_rank() else step(fast)
    outside = step(fast)
    fgtp_pass.unshard(fast)
    assert relative_errors(outside, step(model))[0] < 1e-5, "called outside of autocast again"
    return relative_errors(got, want)[0], got.dtype is want.dtype


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("tokens", ["equal", "ragged"])
def test_ambient_autocast(ranks: Pools, name: str, tokens: str) -> None:
    for error, same_dtype in ranks(2).run(_autocast, name, tokens, torch.bfloat16):
        assert error < 2e-2
        assert same_dtype


@quick
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"mode": "reduce-overhead"}, "inner_options"),
        ({"mode": "max-autotune"}, "max_autotune"),
        ({"options": {"triton.cudagraphs": True}}, "triton.cudagraphs"),
    ],
)
def test_arguments_of_torch_compile_for_inductor(arguments: dict[str, Any], said: str) -> None:
    torch._dynamo.reset()
    fast = torch.compile(nn.Linear(2, 2), backend=fgtp_backend, **arguments)
    with torch.no_grad(), pytest.raises(fgtp_pass.ConfigError, match=said):
        fast(torch.zeros(1, 2))


def _two_threads() -> list[float]:
    """Both call one compiled model; ranks may order them differently, the results may not."""
    model = zoo.build("llama")
    want = step(model)
    fast = compiled(model)
    step(fast)
    errors: list[Any] = []

    def run() -> None:
        for _ in range(8):
            errors.append(relative_errors(step(fast), want)[0])

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def test_two_threads_take_turns(ranks: Pools) -> None:
    for errors in ranks(2).run(_two_threads):
        assert len(errors) == 16
        assert max(errors) < 1e-5


def _sleeper(asleep: list[float]) -> Any:
    """An inner backend with which rank 1 sleeps in the middle of a step, before its collectives."""

    def inner(gm: Any, inputs: Any) -> Any:
        def run(*args: Any) -> Any:
            if dist.get_rank() == 1:
                time.sleep(asleep[0])
            return gm.forward(*args)

        return run

    return inner


def _wait(seconds: float) -> list[str]:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("fgtp_pass").addHandler(handler)
    asleep = [0.0]
    fast = compiled(zoo.build("llama"), inner_backend=_sleeper(asleep), timeout_seconds=30)
    step(fast)
    asleep[0] = seconds
    step(fast)
    logging.getLogger("fgtp_pass").removeHandler(handler)
    return said


def test_a_long_wait_is_logged_once(ranks: Pools) -> None:
    first, second = ranks(2).run(_wait, 9.0)
    waits = [line for line in first if "has waited" in line]
    assert len(waits) == 1, waits
    assert "for rank 1" in waits[0]
    assert "(1 of " in waits[0]
    assert not [line for line in second if "has waited" in line]


def _timeout_in_a_collective() -> tuple[str, float]:
    asleep = [0.0]
    model = zoo.build("llama")
    want = step(model)
    fast = compiled(model, inner_backend=_sleeper(asleep), timeout_seconds=8)
    step(fast)
    asleep[0], start = 25.0, time.monotonic()
    try:
        step(fast)
        said = "no error"
    except fgtp_pass.AgreementError as error:
        said = str(error)
    took = time.monotonic() - start
    asleep[0] = 0.0
    if dist.get_rank() == 0:
        time.sleep(max(0.0, 27.0 - took))  # all ranks are back
    assert relative_errors(step(fast), want)[0] < 1e-5, "the ranks are connected again"
    return said, took


def test_the_timeout_holds_for_collectives_of_the_graph(ranks: Pools) -> None:
    (first, took), (second, _) = ranks(2).run(_timeout_in_a_collective)
    assert "rank 1 did not come within 8 s" in first
    assert took < 25, "the default group's timeout is longer"
    assert "rank 0 had given up waiting after 8 s" in second


def _live_tensors() -> int:
    for _ in range(3):
        gc.collect()
    return sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())


def _rounds(rounds: int) -> list[int]:
    counts = []
    for number in range(rounds):
        model = build(Program())
        fast = compiled(model)
        with torch.no_grad():
            fast(torch.zeros(2, 4, dtype=torch.long))
        if number % 2:
            fgtp_pass.unshard(fast)
        del model, fast
        torch._dynamo.reset()
        counts.append(_live_tensors())
    return counts


def test_rounds_leave_nothing_behind(ranks: Pools) -> None:
    for counts in ranks(2).run(_rounds, 20):
        assert counts[-1] < counts[1] + 18, counts  # less than one a round


def _half_done() -> tuple[list[str], dict[str, str]]:
    """What changed in a model that refused; how each way to the data ends."""
    model = zoo.build("llama")
    fast = compiled(model)
    step(fast)
    whole = {n: p for n, p in model.named_parameters() if not isinstance(p, ShardedParameter)}
    before = {name: p.detach().clone() for name, p in whole.items()}
    weight = next(p for p in model.parameters() if isinstance(p, ShardedParameter))
    other = zoo.build("llama", seed=1).state_dict()
    ways = {
        "load_state_dict": lambda: model.load_state_dict(other),
        "load_state_dict of a part": lambda: model.model.load_state_dict(other, strict=False),
        "to": lambda: model.to(torch.float64),
        "half": lambda: model.half(),
        "to_dlpack": lambda: torch.utils.dlpack.to_dlpack(weight),
        "from_dlpack": lambda: torch.from_dlpack(weight),
        "__dlpack__": lambda: weight.__dlpack__(),
        "data": lambda: weight.data + 1,
        "copy_": lambda: weight.copy_(torch.zeros(1)),
        "numpy": lambda: weight.detach().numpy(),
        "memory of the array": lambda: weight.__array__(),
        "share_memory_": lambda: weight.share_memory_(),
        "untyped_storage": lambda: weight.untyped_storage().tolist(),
    }
    said = {}
    for name, way in ways.items():
        try:
            with torch.no_grad():
                said[name] = f"no error: {way()!r}"[:80]
        except Exception as error:
            said[name] = type(error).__name__
    changed = [name for name, p in whole.items() if not torch.equal(p, before[name])]
    return changed, said


def test_nothing_is_read_or_replaced_by_halves(ranks: Pools) -> None:
    for changed, said in ranks(2).run(_half_done):
        assert not changed
        assert not [f"{name}: {end}" for name, end in said.items() if end.startswith("no error")]

"""Models that run without a graph: as few collectives as with one, and safe to capture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from engines import COMPONENTS, Answer, Job, generate, merged, shared
from random_checkpoints import Checkpoints, prompts
from test_engine_tokens import assert_same
from torch.utils._python_dispatch import TorchDispatchMode

LAYERS = 2
# what the host reads of a device would break a capture, as would a collective that is no op
HOST_READS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal")
HOST_COLLECTIVES = (
    *("all_reduce", "all_gather", "all_gather_object", "broadcast", "barrier", "send", "recv"),
    *("all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single"),
)


class _Recorder(TorchDispatchMode):
    """Every op with the shapes of what it makes, and every call of torch.distributed."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[tuple[str, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        leaves = torch.utils._pytree.tree_leaves(out)
        shapes = [tuple(o.shape) for o in leaves if isinstance(o, torch.Tensor)]
        self.ops.append((str(func), str(shapes)))
        return out


def _recorded(llm: Any, job: Job) -> tuple[Answer, list[list[tuple[str, str]]]]:
    """What each step does in the model."""
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    steps: list[list[tuple[str, str]]] = []

    def recording(stock: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            steps.append([])
            calls: list[str] = []
            patches = [
                mock.patch.object(
                    torch.distributed, name, side_effect=lambda *_, n=name, **__: calls.append(n)
                )
                for name in HOST_COLLECTIVES
            ]
            with _Recorder() as recorder:
                for patch in patches:
                    patch.start()
                try:
                    return stock(*args, **kwargs)
                finally:
                    for patch in patches:
                        patch.stop()
                    steps[-1] += recorder.ops + [("torch.distributed", name) for name in calls]

        return run

    runner.model.forward = recording(runner.model.forward)
    return generate(llm, job), steps


def _counted(step: list[tuple[str, str]]) -> Counter[str]:
    names = (name.split(".")[1] for name, _ in step if name.startswith("_c10d_functional."))
    return Counter(name for name in names if name != "wait_tensor")


def _same_lengths(count: int) -> dict[int, list[int]]:
    """Prompts whose steps are all of one shape, after the first."""
    return {4 * i: ids[:5] + [7] * (5 - len(ids[:5])) for i, ids in prompts(count).items()}


@pytest.mark.parametrize("mode", ["enforce_eager", "breakable"])
def test_without_a_graph(
    engines: Any,
    checkpoint: Checkpoints,
    unsharded: Callable[..., Answer],
    mode: str,
) -> None:
    model, given = checkpoint("llama"), _same_lengths(4)
    every = shared(*COMPONENTS, "qkv")
    options, environment = merged(every, {"enforce_eager": True}), {}
    if mode == "breakable":
        options, environment = every, {"VLLM_USE_BREAKABLE_CUDAGRAPH": "1"}
    parts = ([0, 4], [8, 12])
    jobs = [
        Job(model, {i: given[i] for i in part}, options, environment, run=_recorded)
        for part in parts
    ]
    found = engines(2)(*jobs)
    assert_same(unsharded("llama", {"prompts": given}), [answer for answer, _ in found])
    for _, steps in found:
        decode = steps[2:5]
        for step in decode:
            assert not [op for op in step if any(read in op[0] for read in HOST_READS)]
            assert not [op for op in step if op[0] == "torch.distributed"]
        assert decode[0] == decode[1] == decode[2]
        # ids, and the tokens of each FFN and each qkv; the embedding's sums, each o_proj's cut and
        # sums, each FFN's sums, each qkv's features
        gathers, exchanges = 1 + 2 * LAYERS, 1 + 4 * LAYERS
        counted = _counted(decode[0])
        assert counted == {
            "all_gather_into_tensor": gathers,
            "all_to_all_single": exchanges,
        }, counted


def test_an_ffn_that_moves_more_without_a_graph_says_so(
    engines: Any, sharded: Callable[..., list[Answer]], unsharded: Callable[..., Answer]
) -> None:
    """OPT's layers hold their FFN themselves, so its code cannot be tried at a cut width."""
    got = sharded("opt", merged(shared(), {"enforce_eager": True}))
    assert_same(unsharded("opt"), got)
    said = [line for line in engines(2).log(0).splitlines() if "moves whole activations" in line]
    for layer in range(LAYERS):
        (line,) = [line for line in said if f"layers.{layer}.fc2.weight" in line]
        assert "OPTDecoderLayer cannot be run on cut features alone" in line

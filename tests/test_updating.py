"""Weights of a running model are replaced in place, on all ranks or on none."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import zoo
from checkpoints import assert_same_weights, logits, options
from ranks import Pools
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import fgtp_pass
from fgtp_pass import fgtp_backend


def _model(seed: int = 0, **given: Any) -> Any:
    model = zoo.build("gemma3", seed=seed)
    model.compile(backend=fgtp_backend, options=options(**given))
    logits(model)
    return model


def _new(seed: int) -> dict[str, torch.Tensor]:
    return dict(zoo.build("gemma3", seed=seed).state_dict())


def _one_by_one(weights: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    yield from ((name, tensor.clone()) for name, tensor in weights.items())


def _updates(folder: str) -> None:
    rank = dist.get_rank()
    model = _model(tokens="ragged")
    before = list(model.parameters())
    ways: list[Any] = [
        lambda new: fgtp_pass.update_weights(model, new),
        lambda new: fgtp_pass.update_weights(model, _one_by_one(new)),
        lambda new: fgtp_pass.update_weights(
            model, None if rank else _one_by_one(new), source="rank0"
        ),
        lambda new: fgtp_pass.update_weights(model, f"{folder}/3"),
        lambda new: fgtp_pass.update_weights(model, f"{folder}/4/model.safetensors"),
        lambda new: fgtp_pass.update_weights(
            model, "nowhere" if rank else f"{folder}/5/model.safetensors", source="rank0"
        ),
        lambda new: fgtp_pass.update_weights(model, _sharded_elsewhere(new)),
    ]
    for number, update in enumerate(ways):
        new = _new(10 + number)
        want = _model(10 + number)
        update(new)
        assert_same_weights(model, new)
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert torch.equal(logits(model), logits(want))
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
    _idle_after_update(model)


def _sharded_elsewhere(new: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As a trainer holds them that cuts everything over its ranks."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return {name: distribute_tensor(tensor, mesh, [Shard(0)]) for name, tensor in new.items()}


def _idle_after_update(model: Any) -> None:
    """A rank without tokens multiplies with the new weights: the last inputs are not kept."""
    new = _new(30)
    want = zoo.build("gemma3", seed=30)
    fgtp_pass.update_weights(model, new)
    if dist.get_rank() == 1:
        fgtp_pass.idle_step(model)
        return
    torch.testing.assert_close(logits(model), logits(want), rtol=1e-4, atol=1e-4)


def test_updates_from_tensors_checkpoints_and_rank_0(ranks: Pools, tmp_path: Path) -> None:
    for number in (4, 5):
        zoo.build("gemma3", seed=10 + number).save_pretrained(tmp_path / str(number))
    ranks(1).run(_save_from, str(tmp_path / "3"), 13)
    ranks(2).run(_updates, str(tmp_path))


def _save_from(folder: str, seed: int) -> None:
    fgtp_pass.save_checkpoint(zoo.build("gemma3", seed=seed), folder)


def _atomic() -> list[str]:
    """Whatever goes wrong on whichever rank, both have all of the old weights."""
    rank = dist.get_rank()
    model = _model()
    old, want = _new(0), logits(model)
    new = _new(1)
    name, last = "model.layers.1.mlp.down_proj.weight", list(new)[-2]

    def raising() -> Iterator[tuple[str, torch.Tensor]]:
        for count, pair in enumerate(new.items()):
            if count == 5 and rank == 1:
                raise RuntimeError("the trainer is gone")
            yield pair

    def at_rank_1(**changed: Any) -> dict[str, torch.Tensor]:
        return new | {k.replace("__", "."): v for k, v in changed.items()} if rank == 1 else new

    reordered = dict(reversed(new.items())) if rank == 1 else new
    altered = {name: new[name].clone(), last: new[last].clone()}
    if rank == 1:
        altered[last].view(-1)[0] += 1
    attempts: list[Any] = [
        (new | {"model.layers.1.mlp.dawn_proj.weight": new[name]}, "local"),
        (at_rank_1(**{name: new[name][:-1]}), "local"),
        (raising(), "local"),
        (reordered, "local"),
        (altered, "local"),
        (new | {"lm_head.weight": new["lm_head.weight"] + 1}, "local"),
        (None if rank else raising_at_the_end(new), "rank0"),
        (None if rank else new | {name: new[name].to(torch.int8)}, "rank0"),
        (new, "everywhere"),
    ]
    said = []
    for weights, source in attempts:
        with pytest.raises(Exception) as caught:  # noqa: PT011 (the caller looks at the texts)
            fgtp_pass.update_weights(model, weights, source=source)
        said.append(f"{type(caught.value).__name__}: {caught.value}")
        assert_same_weights(model, old)
        assert torch.equal(logits(model), want)
    fgtp_pass.update_weights(model, {name: new[name]})
    assert_same_weights(model, old | {name: new[name]})
    return said


def raising_at_the_end(new: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    yield from new.items()
    raise RuntimeError("out of memory")


def test_a_failed_update_leaves_the_old_weights_on_all_ranks(ranks: Pools) -> None:
    zero, one = ranks(2).run(_atomic)
    texts = [
        ("'model.layers.1.mlp.dawn_proj.weight' to update. Did you mean", "Did you mean"),
        ("do not update the same weights in the same order", "in the same order"),
        ("rank 1 failed: RuntimeError: the trainer is gone", "RuntimeError: the trainer is gone"),
        ("in the same order", "in the same order"),
        ("have different data for 1 weights", "have different data for 1 weights"),
        ("was given twice", "was given twice"),
        ("RuntimeError: out of memory", "rank 0 failed: RuntimeError: out of memory"),
        ("CheckpointError: model.layers.1.mlp.down_proj.weight is torch.float32", "rank 0 failed"),
        ('source must be "local" or "rank0"', 'source must be "local" or "rank0"'),
    ]
    for first, second, (on_zero, on_one) in zip(zero, one, texts, strict=True):
        assert on_zero in first
        assert on_one in second

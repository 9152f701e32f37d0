"""Models are read from checkpoints in shards, equal to `from_pretrained` bit for bit."""

import math
import shutil
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
import zoo
from checkpoints import (
    assert_same_weights,
    call,
    empty,
    from_pretrained,
    kept_bytes,
    loaded,
    logits,
    options,
)
from marks import architectures
from peak_memory import PeakMemory
from ranks import Pools
from safetensors.torch import load_file, save_file
from torch import nn

import fgtp_pass
from fgtp_pass import CheckpointError
from fgtp_pass.checkpoint.empty_model import fill_buffers


def _load(name: str, folder: str) -> None:
    model, checkpoint = loaded(empty(name), folder)
    with torch._dynamo.config.patch(error_on_recompile=True):
        got = logits(model)
    plain = from_pretrained(folder)
    buffers = dict(plain.named_buffers())
    assert {n: b.dtype for n, b in model.named_buffers()} == {
        n: b.dtype for n, b in buffers.items()
    }
    for key, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[key]), key
    assert_same_weights(model, plain.state_dict())
    assert checkpoint.count.bytes <= 1.05 * kept_bytes(model)
    assert torch.equal(got, logits(plain))
    fgtp_pass.unshard(model)
    assert all(type(p) is nn.Parameter for p in model.parameters())
    assert torch.equal(logits(model), got), "the next call shards again"
    # a model that is built on the meta device alone has its buffers computed by its own code
    bare = zoo.build(name, device="meta")
    fill_buffers(bare, {b: buffers[n] for n, b in bare.named_buffers() if n in bare.state_dict()},
                 torch.device("cpu"))  # fmt: skip
    assert all(torch.equal(buffer, buffers[n]) for n, buffer in bare.named_buffers())


@pytest.mark.parametrize("name", architectures())
def test_loads_as_from_pretrained_does(ranks: Pools, tmp_path: Path, name: str) -> None:
    zoo.build(name).save_pretrained(tmp_path, max_shard_size="150KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    ranks(2).run(_load, name, str(tmp_path))


def _variants(folder: str) -> None:
    """bfloat16 from float32, one file, rank 0 alone, Inductor, more ranks' worth of groups off."""
    rank = dist.get_rank()
    path = Path(folder) / "model.safetensors"
    want = from_pretrained(folder, torch.bfloat16)
    model, _ = loaded(empty("phi3"), path, dtype=torch.bfloat16)
    assert_same_weights(model, want.state_dict())
    own = path if rank == 0 else "/nowhere"
    sent = empty("phi3", torch.bfloat16)
    given = {"kwargs": call(sent.config), "source": "rank0"}
    fgtp_pass.load_checkpoint(sent, own, options=options(inner_backend="inductor"), **given)
    with torch._dynamo.config.patch(error_on_recompile=True):
        logits(sent)
    assert_same_weights(sent, fgtp_pass.full_state_dict(model))
    # again into the same model, with other sizes
    again = {"mlp_tensor_parallel_size": 2}
    loaded(model, path, options=options(finegrained_tp_config=again))
    assert_same_weights(model, fgtp_pass.full_state_dict(sent))
    plan = fgtp_pass.applied_plan(model)
    assert plan is not None
    assert {site.component for site in plan.sites} == {"mlp"}


def test_dtypes_sources_and_inner_backends(ranks: Pools, tmp_path: Path) -> None:
    zoo.build("phi3").save_pretrained(tmp_path)
    ranks(2).run(_variants, str(tmp_path))


SHAPE = {
    "hidden_size": 1024,
    "intermediate_size": 6144,
    "vocab_size": 32000,
    "num_hidden_layers": 1,
    "head_dim": 64,
}


def _memory(toy: str, folder: str) -> dict[str, int]:
    loaded(empty("llama"), toy)  # what importing and compiling take is not what this measures
    model = empty("llama", **SHAPE)
    process = psutil.Process()
    before = process.memory_info().rss
    with PeakMemory(process) as peak:
        model, checkpoint = loaded(model, folder)
    parts = fgtp_pass.shard_state_dict(model)
    return {
        "model": sum(math.prod(p.shape) * p.dtype.itemsize for p in model.parameters()),
        "kept": kept_bytes(model),
        "largest": max(part.nbytes for part in parts.values()),
        "read": checkpoint.count.bytes,
        "peak": peak.bytes - before,
    }


def test_no_rank_is_ever_whole(ranks: Pools, tmp_path: Path) -> None:
    zoo.build("llama").save_pretrained(tmp_path / "toy")
    zoo.build("llama", **SHAPE).save_pretrained(tmp_path / "model")
    for seen in ranks(2).run(_memory, str(tmp_path / "toy"), str(tmp_path / "model")):
        assert seen["kept"] < 0.55 * seen["model"], seen
        assert seen["read"] <= seen["kept"], seen
        assert seen["peak"] <= seen["kept"] + 1.2 * seen["largest"], seen


class Odd(nn.Module):
    """No model of transformers: a buffer that is computed, a weight in no graph, a graph break."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 64, bias=False)
        self.down = nn.Linear(64, 16, bias=False)
        self.unused = nn.Parameter(torch.zeros(3))
        self.scale = nn.Parameter(torch.zeros(1))
        self.register_buffer("table", torch.arange(16.0), persistent=False)

    def forward(self, x: torch.Tensor, eager: bool = False) -> torch.Tensor:
        if eager:
            torch._dynamo.graph_break()
            x = x * read_outside(self.scale)
        return x + self.table + self.down(torch.relu(self.up(x)))


@torch.compiler.disable
def read_outside(weight: torch.Tensor) -> torch.Tensor:
    return weight.detach()


def _plain_module(path: str) -> str:
    with fgtp_pass.init_empty_weights():
        model = Odd()
    assert model.up.weight.is_meta
    assert not model.table.is_meta
    config = options(finegrained_tp_config={"mlp_tensor_parallel_size": 2})
    x = torch.ones(2, 4, 16)
    fgtp_pass.load_checkpoint(model, path, (x,), options=config)
    assert_same_weights(model, load_file(path))
    assert type(model.unused) is nn.Parameter
    # the weight that is read between graphs has not been read when the first graph is compiled
    with fgtp_pass.init_empty_weights():
        model = Odd()
    with pytest.raises(fgtp_pass.ShardedWeightError, match="scale has not been read") as caught:
        fgtp_pass.load_checkpoint(model, path, (x,), {"eager": True}, options=config)
    assert model.up.weight.is_meta
    # and without an own buffer, one of the meta device has no values
    with torch.device("meta"):
        model = Odd()
    with pytest.raises(CheckpointError, match="table: buffers on the meta device"):
        fgtp_pass.load_checkpoint(model, path, (x,), options=config)
    return str(caught.value)


def test_other_modules_than_those_of_transformers(ranks: Pools, tmp_path: Path) -> None:
    path = tmp_path / "odd.safetensors"
    torch.manual_seed(0)
    save_file({n: torch.randn_like(p) for n, p in Odd().named_parameters()}, path)
    for said in ranks(2).run(_plain_module, str(path)):
        assert "scale has not been read from its checkpoint" in said


def _failures(folder: str, damage: dict[str, str]) -> dict[str, str]:
    """What each damaged copy says, and that a good one loads afterwards."""
    said = {}
    model = empty("mixtral", num_hidden_layers=1)
    for how, path in damage.items():
        if how == "other values":
            continue
        try:
            loaded(model, path)
        except fgtp_pass.FgtpError as error:
            said[how] = f"{type(error).__name__}: {error}"
            assert all(p.is_meta for p in model.parameters()), "no weight was touched"
    own = damage["missing file"] if dist.get_rank() == 1 else folder
    try:
        loaded(model, own)
    except fgtp_pass.FgtpError as error:
        said["missing on rank 1"] = str(error)
    other = damage["other values"] if dist.get_rank() == 1 else folder
    try:
        loaded(model, other)
    except fgtp_pass.FgtpError as error:
        said["other values on rank 1"] = str(error)
    loaded(model, folder)
    return said


def _rewritten(folder: Path, to: Path, change: Any) -> Path:
    """A copy of a checkpoint of one file with its tensors changed."""
    shutil.copytree(folder, to)
    tensors = load_file(to / "model.safetensors")
    change(tensors)
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


def test_what_is_wrong_with_a_checkpoint_is_named(ranks: Pools, tmp_path: Path) -> None:
    good = tmp_path / "good"
    zoo.build("mixtral", num_hidden_layers=1).save_pretrained(good)
    head, norm = "lm_head.weight", "model.norm.weight"
    expert = "model.layers.0.block_sparse_moe.experts.1.w2.weight"

    def renamed(t: dict[str, Any]) -> None:
        t["lm_heat.weight"] = t.pop(head)

    copies = {
        "renamed": _rewritten(good, tmp_path / "renamed", renamed),
        "shape": _rewritten(good, tmp_path / "shape", lambda t: t.update({norm: t[norm][:-1]})),
        "dtype": _rewritten(
            good, tmp_path / "dtype", lambda t: t.update({norm: t[norm].to(torch.float8_e4m3fn)})
        ),
        "expert": _rewritten(good, tmp_path / "expert", lambda t: t.pop(expert)),
        "other values": _rewritten(good, tmp_path / "other", lambda t: t[norm].add_(1)),
    }
    truncated = tmp_path / "truncated"
    shutil.copytree(good, truncated)
    file = truncated / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    indexed = tmp_path / "indexed"
    zoo.build("mixtral", num_hidden_layers=1).save_pretrained(indexed, max_shard_size="150KB")
    lost = sorted(indexed.glob("*.safetensors"))[1]
    lost.unlink()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "pytorch_model.bin").touch()
    damage = {how: str(path) for how, path in copies.items()} | {
        "truncated": str(truncated),
        "missing file": str(indexed),
        "no folder": str(tmp_path / "none"),
        "no safetensors": str(tmp_path / "bin"),
    }
    del damage["other values"]
    outcomes = ranks(2).run(
        _failures, str(good), damage | {"other values": str(copies["other values"])}
    )
    for rank, said in enumerate(outcomes):
        assert "lm_head.weight (nearest unused: lm_heat.weight)" in said["renamed"]
        assert f"{norm} has shape [64] in the model, and was given as [63]" in said["shape"]
        assert "Quantised checkpoints have to be dequantised first" in said["dtype"]
        assert "experts" in said["expert"]
        assert str(file) in said["truncated"]
        assert str(lost) in said["missing file"]
        assert "there is no checkpoint at" in said["no folder"]
        assert "has no safetensors files" in said["no safetensors"]
        alone = said["missing on rank 1"]
        assert (str(lost) in alone) if rank else ("rank 1 failed: CheckpointError" in alone)
        assert (
            "the ranks have different data for 1 weights: model.norm.weight"
            in (said["other values on rank 1"])
        )

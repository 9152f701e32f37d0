"""Sharded models are saved in shards or merged, and read again on any number of ranks."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import zoo
from checkpoints import assert_same_weights, empty, kept_bytes, loaded, logits, options
from ranks import Pools
from safetensors.torch import load_file
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from transformers import AutoModelForCausalLM

import fgtp_pass
from fgtp_pass import CheckpointError, fgtp_backend
from fgtp_pass.checkpoint import shard_files
from fgtp_pass.checkpoint.shard_index import INDEX_NAME

# a vocabulary that no group size divides, a fused gate and up projection, tied weights
NAME, SMALL = "phi3", {"num_hidden_layers": 1}
ODD = {"vocab_size": 163, "intermediate_size": 70, "tie_word_embeddings": True, **SMALL}


def _sharded(name: str = NAME, **overrides: Any) -> Any:
    """A model that is sharded as usual, by its first call."""
    model = zoo.build(name, **overrides)
    model.compile(backend=fgtp_backend, options=options(dist.get_world_size()))
    logits(model)
    return model


def _save(folder: str) -> None:
    """Save in shards and merged; the shards read by these ranks again, each its own file."""
    want = zoo.build(NAME, **ODD).state_dict()
    model = _sharded(**ODD)
    fgtp_pass.save_checkpoint(model, f"{folder}/shards")
    fgtp_pass.save_checkpoint(model, f"{folder}/merged", merge=True)
    again, checkpoint = loaded(empty(NAME, **ODD), f"{folder}/shards", dist.get_world_size())
    assert_same_weights(again, want)
    assert checkpoint.count.bytes <= kept_bytes(again)
    assert torch.equal(logits(again), logits(model))
    fgtp_pass.save_checkpoint(again, f"{folder}/shards")  # over the earlier one


def _read(folder: str, k: int) -> None:
    """On another number of ranks the same shards are cut anew."""
    want = zoo.build(NAME, **ODD).state_dict()
    model, _ = loaded(empty(NAME, **ODD), f"{folder}/shards", k)
    assert_same_weights(model, want)
    by_torch = {n: torch.zeros_like(t) for n, t in want.items() if n != "lm_head.weight"}
    dcp.load(by_torch, storage_reader=HuggingFaceStorageReader(f"{folder}/shards"))
    assert all(torch.equal(tensor, want[name]) for name, tensor in by_torch.items())
    _load_distributed(folder, want, k)


def _load_distributed(folder: str, want: dict[str, torch.Tensor], k: int) -> None:
    """What torch's distributed checkpoint saved on other ranks goes into this sharded model."""
    model = _sharded(seed=1, **ODD)
    before = logits(model)
    state = model.state_dict(keep_vars=True)
    dcp.load(state, checkpoint_id=f"{folder}/distcp")
    assert_same_weights(model, want)
    assert not torch.equal(logits(model), before)
    with torch._dynamo.config.patch(error_on_recompile=True):
        logits(model)


def _save_distributed(folder: str) -> None:
    model = _sharded(**ODD)
    before = logits(model)
    dcp.save(model.state_dict(keep_vars=True), checkpoint_id=f"{folder}/distcp")
    assert torch.equal(logits(model), before)
    # in safetensors too, which load_checkpoint reads; of a model without fused weights
    plain = _sharded("llama", **SMALL)
    want = fgtp_pass.full_state_dict(plain)
    writer = HuggingFaceStorageWriter(f"{folder}/hf", save_distributed=True)
    dcp.save(plain.state_dict(keep_vars=True), storage_writer=writer)
    fgtp_pass.update_weights(plain, {name: tensor + 1 for name, tensor in want.items()})
    fgtp_pass.update_weights(plain, f"{folder}/hf")
    assert_same_weights(plain, want)


def test_shards_are_read_again_on_any_number_of_ranks(ranks: Pools, tmp_path: Path) -> None:
    ranks(2).run(_save, str(tmp_path))
    ranks(2).run(_save_distributed, str(tmp_path))
    index = json.loads((tmp_path / "shards" / INDEX_NAME).read_text())
    assert {site["component"] for site in index["plan"]["sites"]} == set(zoo.COMPONENTS)
    held = [file["parts"].keys() for file in index["files"].values()]
    assert any("model.layers.0.mlp.gate_up_proj.weight" in names for names in held)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    want = zoo.build(NAME, **ODD).state_dict()
    assert all(torch.equal(t, want[n]) for n, t in merged.state_dict().items())
    ranks(3).run(_read, str(tmp_path), 3)
    # and without other ranks, whole
    alone, _ = loaded(empty(NAME, **ODD), tmp_path / "shards", 1)
    assert all(torch.equal(t, want[n]) for n, t in alone.state_dict().items())


def _merge(folder: str, name: str) -> None:
    model = _sharded(name)
    fgtp_pass.save_checkpoint(model, folder, merge=True)


@pytest.mark.parametrize("name", ["mixtral", "gpt_neox"])
def test_merged_checkpoints_have_the_names_that_transformers_writes(
    ranks: Pools, tmp_path: Path, name: str
) -> None:
    zoo.build(name).save_pretrained(tmp_path / "want")
    ranks(2).run(_merge, str(tmp_path / "got"), name)
    got = load_file(tmp_path / "got" / "model.safetensors")
    want = load_file(tmp_path / "want" / "model.safetensors")
    assert got.keys() == want.keys()
    assert all(torch.equal(got[key], want[key]) for key in want)


def _save_on_hosts(folders: list[str]) -> None:
    """Each rank on a host with a disk of its own."""
    own = folders[dist.get_rank()]
    model = _sharded("llama", **SMALL)
    want = fgtp_pass.full_state_dict(model)
    fgtp_pass.save_checkpoint(model, own)
    fgtp_pass.update_weights(model, {name: tensor + 1 for name, tensor in want.items()})
    fgtp_pass.update_weights(model, own)
    assert_same_weights(model, want)


def _damaged(folders: dict[str, str]) -> dict[str, str]:
    model = _sharded("llama", **SMALL)
    said = {}
    for how, folder in folders.items():
        try:
            fgtp_pass.update_weights(model, folder)
        except fgtp_pass.FgtpError as error:
            said[how] = f"{type(error).__name__}: {error}"
    return said


def _copied(of: Path, to: Path, change: Any = lambda folder: None) -> Path:
    shutil.copytree(of, to, dirs_exist_ok=True)
    change(to)
    return to


def _flip(path: Path) -> None:
    """Change one byte near the end of a file, which is in a tensor."""
    content = bytearray(path.read_bytes())
    content[-7] ^= 1
    path.write_bytes(content)


def test_damaged_missing_and_foreign_files_are_named(ranks: Pools, tmp_path: Path) -> None:
    hosts = [tmp_path / "host0", tmp_path / "host1"]
    ranks(2).run(_save_on_hosts, [str(host) for host in hosts])
    both = _copied(hosts[1], _copied(hosts[0], tmp_path / "both"))
    first, second = sorted(both.glob("*.safetensors"))
    zoo.build("llama").save_pretrained(tmp_path / "normal")
    foreign = tmp_path / "normal" / "model.safetensors"

    def cut_off(folder: Path) -> None:
        (folder / first.name).write_bytes(first.read_bytes()[:-8])

    def swap(folder: Path) -> None:
        shutil.copy(foreign, folder / first.name)

    copies = {
        "both": both,
        "flipped": _copied(both, tmp_path / "flipped", lambda f: _flip(f / second.name)),
        "cut off": _copied(both, tmp_path / "cut off", cut_off),
        "swapped": _copied(both, tmp_path / "swapped", swap),
        "foreign": _copied(both, tmp_path / "foreign", lambda f: shutil.copy(foreign, f)),
        "no index": _copied(both, tmp_path / "no index", lambda f: (f / INDEX_NAME).unlink()),
        "half an index": _copied(
            both, tmp_path / "half", lambda f: (f / INDEX_NAME).write_text("{")
        ),
        "one host": hosts[0],
        "none": _copied(both, tmp_path / "none", lambda f: [p.unlink() for p in f.glob("s*")]),
    }
    for rank, said in enumerate(ranks(2).run(_damaged, {h: str(f) for h, f in copies.items()})):
        assert "both" not in said
        assert f"{copies['flipped'] / second.name} is damaged: the checksum" in said["flipped"]
        if rank == 1:  # rank 0 has read what it keeps, and it was whole
            assert "is not all in the checkpoint" in said["one host"]
        else:
            assert "rank 1 failed: CheckpointError" in said["one host"]
        assert f"{copies['cut off'] / first.name} is damaged: it has" in said["cut off"]
        assert f"{copies['swapped'] / first.name} is damaged" in said["swapped"]
        assert "model.safetensors is not of the checkpoint" in said["foreign"]
        assert f"{INDEX_NAME} is missing: the shards there were not saved" in said["no index"]
        assert f"{INDEX_NAME} is damaged" in said["half an index"]
        assert f"{first.name} is missing" in said["none"]


def _interrupted(folder: str, other: str) -> list[str]:
    """A save that fails on one rank, and one into a folder of something else."""
    model = _sharded("llama", **SMALL)
    said = []
    real = shard_files.save_file

    def failing(*args: Any, **kwargs: Any) -> None:
        real(*args, **kwargs)
        if dist.get_rank() == 1:
            raise OSError("no space left")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_files, "save_file", failing)
        with pytest.raises(Exception, match="no space left") as caught:
            fgtp_pass.save_checkpoint(model, folder)
        said.append(str(caught.value))
    with pytest.raises(CheckpointError, match="is of another checkpoint"):
        fgtp_pass.save_checkpoint(model, other)
    with pytest.raises(fgtp_pass.FgtpError, match="is of another checkpoint"):  # rank 0 writes it
        fgtp_pass.save_checkpoint(model, folder, merge=True)
    fgtp_pass.update_weights(model, folder)
    return said


def test_a_save_that_fails_leaves_the_one_before(ranks: Pools, tmp_path: Path) -> None:
    zoo.build("llama").save_pretrained(tmp_path / "normal")
    ranks(2).run(_save_on_hosts, [str(tmp_path / "shards")] * 2)
    files = sorted(p.name for p in (tmp_path / "shards").iterdir())
    said = ranks(2).run(_interrupted, str(tmp_path / "shards"), str(tmp_path / "normal"))
    assert "rank 1 failed: OSError: no space left" in said[0][0]
    assert sorted(p.name for p in (tmp_path / "shards").iterdir()) == files

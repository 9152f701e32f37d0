"""The examples run, and print what they promise."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from marks import full
from ranks import HANG

EXAMPLES = Path(__file__).parent.parent / "examples"


def output_of(*command: str) -> str:
    """What an example prints. Fails if it hangs, or ends with an error."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=EXAMPLES,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=2 * HANG,
    )
    assert done.returncode == 0, f"{command}: status {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def test_demo_tiny() -> None:
    out = output_of("demo.py", "--tiny", "--inner", "eager")
    assert "W[out/k]" in out  # the plan, with its brackets
    for component in ("embedding", "oproj", "mlp", "lmhead"):
        assert component in out
    for line in ("rank 0, weights", "rank 1, resident", "tokens/s", "against the compiled one"):
        assert line in out
    for rank in range(2):
        assert f"rank {rank}: all 12 tokens of the three runs are the same" in out


def test_custom_pattern() -> None:
    out = output_of("custom_pattern.py")
    assert "model.layers.1.self_attn.q_b_proj.weight" in out
    assert "kv_b_proj" not in out
    assert "q_b        2      2" in out
    assert "same logits as unsharded" in out


def test_ragged_serving() -> None:
    out = output_of("ragged_serving.py")
    assert "rank 0: 10 steps, 4 idle, tokens as unsharded: True" in out
    assert "rank 1: 7 steps, 7 idle, tokens as unsharded: True" in out


def test_load_shards() -> None:
    out = output_of("load_shards.py")
    (size,) = re.findall(r"the model has (\d+) MiB", out)
    took = re.findall(r"took (\d+) MiB", out)
    assert len(took) == 2
    assert all(int(mib) < int(size) for mib in took)
    assert out.count("saved and loaded again, same logits: True") == 2


def test_weight_sync() -> None:
    out = output_of("weight_sync.py")
    for rank in range(2):
        for number in range(3):
            assert f"rank {rank}: round {number}: tokens as of the trainer's model: True" in out
        assert f"rank {rank}: tokens as of round 2: True" in out
    assert "rank 1: round 3: rank 0 failed: RuntimeError: the trainer went down" in out


def test_plan_a_model() -> None:
    out = output_of("plan_a_model.py")
    assert "weights per rank: 14.96 GiB before, 3.18 GiB after" in out
    assert "99 collectives" in out  # 3 in each of 32 layers, 2 for the table, 1 for the head
    assert "qkv is off" in out


_FAILING = """
import os, sys, time
import two_ranks

def rank_main(how):
    import torch.distributed as dist
    if dist.get_rank() == 1:
        if how == "raise":
            raise ValueError("out of luck")
        if how == "die":
            os._exit(7)
    dist.barrier() if how != "hang" else time.sleep(600)

if __name__ == "__main__":
    two_ranks.run(rank_main, sys.argv[1], timeout=float(sys.argv[2]))
"""


@pytest.mark.parametrize(
    ("how", "timeout", "says"),
    [
        ("raise", "600", "rank 1 failed, so all ranks were stopped"),
        ("die", "600", "all ranks were stopped"),
        ("hang", "5", "was not done after 5 s; all ranks were stopped"),
    ],
)
def test_a_rank_that_fails_stops_all(tmp_path: Path, how: str, timeout: str, says: str) -> None:
    script = tmp_path / "failing.py"
    script.write_text(_FAILING)
    done = subprocess.run(
        [sys.executable, str(script), how, timeout],
        env={**os.environ, "PYTHONPATH": str(EXAMPLES)},
        capture_output=True,
        text=True,
        timeout=2 * HANG,
    )
    assert done.returncode == 1
    assert says in done.stderr
    if how == "raise":
        assert "out of luck" in done.stderr


@pytest.mark.parametrize(
    ("world", "models"),
    [("2", ("llama", "gemma2", "gpt2")), pytest.param("3", ("phi",), marks=full)],
)
def test_messages_and_bytes_are_as_planned(world: str, models: tuple[str, ...]) -> None:
    """Counted on every rank while a step runs; the command fails if a row is not as planned."""
    out = output_of(
        "../benchmarks/messages.py", "--tokens", "3", "--world", world, "--models", *models
    )
    assert "embedding, lmhead, oproj, mlp" in out

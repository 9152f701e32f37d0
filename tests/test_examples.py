"""The examples run, in time, and print what they promise."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def output_of(*command: str, limit: float = 300) -> str:
    """What an example prints. Fails if it does not end in time, or ends with an error."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=EXAMPLES,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=limit,
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


def test_plan_a_model() -> None:
    out = output_of("plan_a_model.py")
    assert "weights per rank: 14.96 GiB before, 3.18 GiB after" in out
    assert "132 collectives" in out
    assert "feeds an attention core (q, k or v)" in out


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
        ("raise", "60", "rank 1 failed, so all ranks were stopped"),
        ("die", "60", "all ranks were stopped"),
        ("hang", "20", "was not done after 20 s; all ranks were stopped"),
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
        timeout=120,
    )
    assert done.returncode == 1
    assert says in done.stderr
    if how == "raise":
        assert "out of luck" in done.stderr

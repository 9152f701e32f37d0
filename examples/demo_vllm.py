"""Real `vllm serve` with two data-parallel ranks, unsharded and sharded by fgtp_pass.

    python examples/demo_vllm.py

Makes a tiny random Llama and a tiny random Qwen3-MoE, serves each with DP=2 first as it is and
then with `"passes": ["fgtp"]`, sends the same completions to both over HTTP, some at once and some
late, so that a rank idles, and compares the tokens. Then the Llama once more, sharded, with the V2
model runner, which GPUs use, and an EAGLE drafter. Needs vLLM (`make demo-vllm` installs its CPU
build). Exits with status 1 if tokens differ, or if a server does not come up.
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import vllm_cpu_moe
from openai import OpenAI
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.utils.logging import disable_progress_bar

START_SECONDS, REQUEST_SECONDS, NEW_TOKENS = 240, 120, 12
VOCABULARY = 512
V2_WITH_DRAFTER = "sharded, V2 model runner, EAGLE drafter"
COMPONENTS = ("embedding", "lmhead", "oproj", "mlp")
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
}


def dense() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**_SHAPE))


def moe() -> PreTrainedModel:
    """Its first layer is dense, so that it has an FFN to shard; the second has four experts."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**_SHAPE, **experts, mlp_only_layers=[0]))


def write_checkpoint(model: PreTrainedModel, folder: Path) -> Path:
    """Random weights, as a checkpoint that vLLM loads."""
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.08)
    model.save_pretrained(folder)
    return folder


def write_drafter(folder: Path) -> Path:
    """An EAGLE drafter of one layer; embedding and lm_head are its target's."""
    config = LlamaConfig(**_SHAPE | {"num_hidden_layers": 1})
    write_checkpoint(LlamaForCausalLM(config), folder)
    weights = {
        name.removeprefix("model."): weight
        for name, weight in load_file(folder / "model.safetensors").items()
        if "layers." in name and "input_layernorm" not in name
    }
    hidden = config.hidden_size
    weights["fc.weight"] = torch.randn(hidden, 2 * hidden) * 0.08  # of a token and what precedes it
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config.architectures = ["EagleLlamaForCausalLM"]
    config.save_pretrained(folder)
    return folder


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def serving(model: Path, log: Path, arguments: Sequence[str], v2: bool) -> Iterator[int]:
    """A running `vllm serve` of two ranks; gives its port, and ends all its processes.

    v2: with the V2 model runner, whose kernels then run in Triton's interpreter.
    """
    port = free_port()
    command = [str(Path(sys.executable).with_name("vllm")), "serve", str(model)]
    command += ["--port", str(port), "--data-parallel-size", "2"]
    command += ["--dtype", "float32", "--max-model-len", "128", "--max-num-seqs", "8"]
    command += ["--skip-tokenizer-init", *arguments]
    # small, and without a C++ compiler: graphs run uncompiled behind Dynamo
    cpu = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    cpu |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_CI_ENV": "1"}
    if v2:
        cpu |= {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
    plugin = log.parent / "plugin"
    vllm_cpu_moe.register(plugin)
    # Python runs it in every process, before vLLM is imported
    (plugin / "sitecustomize.py").write_text("import triton_on_cpus\ntriton_on_cpus.install()\n")
    before = filter(None, [os.environ.get("PYTHONPATH")])
    paths = [str(Path(vllm_cpu_moe.__file__).parent), str(plugin), *before]
    environment = os.environ | cpu | {"PYTHONPATH": os.pathsep.join(paths)}
    with log.open("w") as out:
        server = subprocess.Popen(
            command, stdout=out, stderr=out, env=environment, start_new_session=True
        )
    try:
        wait_until_up(server, port, log)
        yield port
    finally:
        end_session(server)


def wait_until_up(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while server.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    lines = log.read_text().splitlines()
    causes = [line for line in lines if "Error" in line and "  File" not in line]
    shown = "\n".join(causes[-5:] or lines[-5:])
    raise SystemExit(f"the server did not come up; its log ends with:\n{shown}")


def end_session(server: subprocess.Popen[bytes]) -> None:
    """vLLM's processes are all in the session that the server was started in."""
    server.terminate()
    with suppress(subprocess.TimeoutExpired):
        server.wait(20)
    with suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)


def complete(port: int, model: Path) -> list[list[int]]:
    """The tokens of ten prompts: six at once, then four one after the other."""
    client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
    source = random.Random(0)
    prompts = [
        [source.randrange(1, VOCABULARY) for _ in range(source.randrange(3, 40))] for _ in range(10)
    ]

    def ask(prompt: list[int]) -> list[int]:
        answer = client.completions.create(
            model=str(model),
            prompt=prompt,
            max_tokens=NEW_TOKENS,
            temperature=0,
            timeout=REQUEST_SECONDS,
            extra_body={"return_token_ids": True, "ignore_eos": True},
        )
        tokens: list[int] = answer.choices[0].token_ids  # type: ignore[attr-defined]
        return tokens

    with ThreadPoolExecutor(6) as pool:
        at_once = list(pool.map(ask, prompts[:6]))
    return at_once + [ask(prompt) for prompt in prompts[6:]]


def held_per_rank(log: Path) -> str:
    """What the pass reports in the server's log."""
    lines = [line for line in log.read_text().splitlines() if "fgtp: ranks" in line]
    if not lines:
        raise SystemExit(f"the pass did not report what it sharded; see {log}")
    return lines[0].split("; ")[-1]


def main() -> None:
    disable_progress_bar()  # of writing models of a megabyte
    console = Console()
    sizes = {f"{component}_tensor_parallel_size": 2 for component in COMPONENTS}
    sharded = (
        "--compilation-config",
        json.dumps({"passes": ["fgtp"]}),
        "--additional-config",
        json.dumps({"finegrained_tp_config": sizes}),
    )
    console.print("vllm serve MODEL --data-parallel-size 2", *map(repr, sharded), highlight=False)
    table = Table("model", "served", "weights per rank", "tokens")
    failed = False
    with tempfile.TemporaryDirectory(prefix="fgtp_demo_") as name:
        folder, want = Path(name), dict[Path, list[list[int]]]()
        llama = write_checkpoint(dense(), folder / "llama")
        qwen = write_checkpoint(moe(), folder / "qwen3_moe")
        drafter = {"method": "eagle", "model": str(write_drafter(folder / "drafter"))}
        drafts = json.dumps(drafter | {"num_speculative_tokens": 2})
        experts = ("--enable-expert-parallel", "--enforce-eager")
        for model, how, arguments in (
            (llama, "unsharded", ()),
            (llama, "sharded", sharded),
            (llama, V2_WITH_DRAFTER, (*sharded, "--speculative-config", drafts)),
            (qwen, "unsharded", experts),
            (qwen, "sharded", (*experts, *sharded)),
        ):
            log, what = folder / "log", f"{model.name}, {how}"
            with (
                console.status(f"{what}: starting vllm serve with two ranks ..."),
                serving(model, log, arguments, v2=how == V2_WITH_DRAFTER) as port,
            ):
                console.print(f"{what}: serving, sending ten completions")
                tokens = complete(port, model)
            if model not in want:
                want[model] = tokens
                size = (model / "model.safetensors").stat().st_size
                table.add_row(model.name, how, f"{size / 2**10:.1f} KiB", "those to compare with")
                continue
            same = tokens == want[model]
            failed |= not same
            verdict = "the same" if same else "DIFFER"
            table.add_row(model.name, how, held_per_rank(log), verdict)
    console.print(table)
    if failed:
        raise SystemExit("a sharded server gave other tokens")


if __name__ == "__main__":
    main()

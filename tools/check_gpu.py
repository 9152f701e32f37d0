"""Checks on one CUDA device what a CPU cannot show: NCCL, CUDA graphs, its kernels, real sizes.

    python tools/check_gpu.py      # or `make check-gpu`; ten minutes at most, no network

Needs torch, transformers and this checkout. Two ranks share the device. NCCL refuses that to ranks
of one host, so each is given a host id of its own and they talk over sockets; where that fails they
talk over gloo, and what needs NCCL is skipped. Two ranks on one device take turns, so no time that
is measured here says how fast several devices are; only `gpu_rank` gives figures to keep.

Every check runs in ranks that are started anew after a failure, so that one failure hides no other.
Prints a line for each and writes them as JSON. Exits with status 1 if one failed. Without a CUDA
device it says so and ends; `--device cpu` tries the same code over gloo, without CUDA graphs.
"""

import argparse
import faulthandler
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # runs from a clone that is not installed

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import zoo  # noqa: E402
from decoding import compare_with_unsharded, prompts, relative_errors, sizes  # noqa: E402
from ranks import Pool, RankTimeout, serve_calls  # noqa: E402

import fgtp_pass  # noqa: E402
from fgtp_pass import fgtp_backend  # noqa: E402
from fgtp_pass.calibration.measure import measure  # noqa: E402
from fgtp_pass.collectives.groups import data_parallel_group  # noqa: E402

WORLD = 2
LIMIT = 300.0  # seconds, for one check; what takes so long hangs
# two ranks on one device must look like two hosts, which talk over sockets
NCCL = {"NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1", "NCCL_NET": "Socket"}
# separate and fused projections, [out, in] and [in, out], biases, tied weights, MLA. Experts are
# chosen without a look at the data, so that the graph stays one.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma3": {},
    "gpt2": {},
    "deepseek_v3": {"v_head_dim": 16, "experts_implementation": "batched_mm"},
}
# in half precision rounding can tip a router, and then a token takes another expert
DENSE: dict[str, dict[str, Any]] = {"deepseek_v3": {"first_k_dense_replace": 3}}
FP32_MAX, BF16_RMS = 1e-4, 0.05  # a component without its collective is off by more than 0.1


# in the ranks ------------------------------------------------------------------------------------


def serve(rank: int, world: int, store: str, pipe: Connection, dump: str) -> None:
    """A rank that has no process group yet; see `connect`."""
    with open(dump, "w") as file:
        faulthandler.register(signal.SIGUSR1, file=file, all_threads=True)
        os.environ |= {**NCCL, "NCCL_HOSTID": f"fgtp-check-{rank}"}
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "FGTP_STORE": store}
        serve_calls(pipe)


def connect(backend: str, device: str) -> str:
    """Form the process group and move a tensor; says what it is."""
    if device == "cuda":
        torch.cuda.set_device(0)
    else:
        torch.set_num_threads(1)
    dist.init_process_group(
        backend,
        init_method=f"file://{os.environ['FGTP_STORE']}",
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=timedelta(seconds=LIMIT),
    )
    mine = torch.full((4,), float(dist.get_rank()), device=device)
    everyones = [torch.empty_like(mine) for _ in range(WORLD)]
    dist.all_gather(everyones, mine)
    assert torch.cat(everyones).tolist() == [0.0] * 4 + [1.0] * 4
    return backend


def numerics(name: str, dtype: str, inner: str, tokens: str, device: str) -> str:
    """All components of a model against itself unsharded: prefill and decode."""
    options = ARCHITECTURES[name] | (DENSE.get(name, {}) if dtype == "bfloat16" else {})
    found = compare_with_unsharded(
        name,
        sizes(WORLD),
        dtype=dtype,
        inner=inner,
        tokens=tokens,
        steps=1 if inner == "inductor" else 2,
        device=device,
        **options,
    )
    plan = fgtp_pass.Plan.from_json(found["plan"])
    components = {site.component for site in plan.sites}
    assert components == {"embedding", "lmhead", "oproj", "mlp"}, f"sharded only {components}"
    worst, limit = (found["max"], FP32_MAX) if dtype == "float32" else (found["rms"], BF16_RMS)
    assert worst <= limit, f"off by {worst:.1e}, more than {limit:g}"
    return f"off by {worst:.1e}"


@torch.no_grad()
def idle(device: str) -> str:
    """Rank 1 has no tokens in every other step."""
    model = zoo.build("llama", device=device)
    given = [prompts(dist.get_rank(), 2, length, 160).to(device) for length in (5, 5, 6, 6)]
    wants = [model(input_ids=ids, use_cache=False).logits for ids in given]
    options = {
        "finegrained_tp_config": sizes(WORLD),
        "inner_backend": "eager",
        "tokens": "ragged",
    }
    fast = torch.compile(model, backend=fgtp_backend, options=options)
    worst = 0.0
    for step, (ids, want) in enumerate(zip(given, wants, strict=True)):
        if dist.get_rank() == 1 and step % 2:
            fgtp_pass.idle_step(fast)
        else:
            got = fast(input_ids=ids, use_cache=False).logits
            worst = max(worst, relative_errors(got, want)[0])
    assert worst <= FP32_MAX, f"off by {worst:.1e}"
    return f"off by {worst:.1e}"


@torch.no_grad()
def cuda_graph(inner: str) -> str:
    """A step, captured with its collectives and replayed on other tokens.

    The ranks' agreement on token counts runs on the host and is not part of a replay, so it is off.
    """
    model = zoo.build("llama", device="cuda")
    given = [prompts(dist.get_rank() + 10 * i, 2, 6, 160).cuda() for i in range(2)]
    wants = [model(input_ids=ids, use_cache=False).logits for ids in given]
    fast = torch.compile(
        model,
        backend=fgtp_backend,
        dynamic=False,
        options={
            "finegrained_tp_config": sizes(WORLD),
            "inner_backend": inner,
            "check_tokens": False,
        },
    )
    ids = given[0].clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            fast(input_ids=ids, use_cache=False)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # thread_local: NCCL's watchdog thread asks CUDA about events meanwhile
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        out = fast(input_ids=ids, use_cache=False).logits
    worst = 0.0
    for tokens, want in [*zip(given, wants, strict=True)][::-1]:
        ids.copy_(tokens)
        out.zero_()
        graph.replay()
        torch.cuda.synchronize()
        worst = max(worst, relative_errors(out, want)[0])
    assert worst <= FP32_MAX, f"a replay is off by {worst:.1e}"
    return f"captured once, replayed on two batches, off by {worst:.1e}"


def constants(device: str) -> str:
    """The calibration of the cost model, over the same collectives."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    group = data_parallel_group(None, timedelta(seconds=LIMIT))
    found = measure(group, torch.device(device), [dtype])
    rate = next(iter(found.matmul_rates.values())).value
    assert rate > 0
    assert found.memory_bandwidth.value > 0
    return (
        f"{found.memory_bandwidth.value / 1e9:.3g} GB/s, {rate / 1e12:.3g} Tflop/s per rank, "
        f"all_gather from {1e6 * found.within_node.all_gather.base_seconds:.0f} us "
        "(two ranks on one device)"
    )


# around them -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What one check came to. status: "ok", "FAILED" or "skipped"."""

    check: str
    status: str
    seconds: float
    said: str


class Skipped(Exception):
    """Why a check was not made."""


class Checks:
    """Runs checks one after the other, in ranks that live as long as nothing fails."""

    def __init__(self, device: str, seconds: float):
        self.device = device
        self.backend = ""
        self.results: list[Result] = []
        self._end = time.monotonic() + seconds
        self._pool: Pool | None = None

    def remaining(self) -> float:
        return self._end - time.monotonic()

    def run(self, name: str, check: Callable[[], str]) -> None:
        """Make a check; it says what it found, or raises."""
        begun = time.monotonic()
        try:
            if self.remaining() < 5:
                raise Skipped("the time is over; --minutes gives it more")
            status, said = "ok", check()
        except Skipped as reason:
            status, said = "skipped", str(reason)
        except Exception as error:
            status, said = "FAILED", f"{type(error).__name__}: {error}"
        result = Result(name, status, round(time.monotonic() - begun, 1), said)
        self.results.append(result)
        lines = said.splitlines() or [""]
        print(f"{status:8}{result.seconds:6.1f} s  {name}: {lines[0]}", flush=True)
        for line in lines[1:] if status == "FAILED" else ():
            print(f"{'':18}{line}", flush=True)

    def in_ranks(self, function: Callable[..., str], *args: Any) -> str:
        """What rank 0 says. A rank that raises, dies or hangs is an error, and ends them all."""
        if not self.backend and function is not connect:
            raise Skipped("the two ranks formed no group")
        if self._pool is None:
            self._pool = Pool(WORLD, serve, daemon=False)
            if function is not connect:
                self.in_ranks(connect, self.backend, self.device)
        limit = max(5.0, min(LIMIT, self.remaining()))
        try:
            outcomes = self._pool.outcomes(function, *args, timeout=limit)
        except RankTimeout as error:
            self.end()
            raise RuntimeError(str(error)) from None
        failed = [(rank, o) for rank, o in enumerate(outcomes) if o.error]
        if failed:
            self.end()
            raise RuntimeError(
                "\n".join(f"rank {rank}: {o.trace or o.message}" for rank, o in failed)
            )
        return str(outcomes[0].value)

    def end(self) -> None:
        if self._pool is not None:
            self._pool.kill()
            self._pool = None

    def form_group(self) -> str:
        """NCCL if two ranks may share the device, else gloo."""
        why = ""
        for backend in ("nccl", "gloo") if self.device == "cuda" else ("gloo",):
            try:
                self.backend = self.in_ranks(connect, backend, self.device)
                return f"over {backend}{why}"
            except RuntimeError as error:
                why = f"; NCCL failed: {str(error).strip().splitlines()[-1]}"
        raise RuntimeError(why)

    def needs_nccl(self) -> None:
        if self.device != "cuda":
            raise Skipped("needs a CUDA device")
        if self.backend != "nccl":
            raise Skipped("needs NCCL between the two ranks")


def gpu_rank(device: str, seconds: float) -> tuple[str, Any]:
    """benchmarks/gpu_rank.py at real sizes; its table, and its figures."""
    output = ROOT / "benchmarks" / "results" / "gpu_rank.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_rank.py"), "--output", str(output)]
    command += ["--tokens", "4,64", "--groups", "2,8", "--repetitions", "10"]
    if device == "cpu":
        command += ["--device", "cpu", "--tiny", "--tokens", "4", "--groups", "2", "--calls", "2"]
    done = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=max(5.0, seconds),
    )
    if done.returncode != 0:
        raise RuntimeError(done.stderr.strip().splitlines()[-1] + "\n" + done.stderr)
    print(done.stdout[: done.stdout.find("\n{")].rstrip(), flush=True)
    found = json.loads(output.read_text())
    gains = [gain for row in found["results"] for gain in row["unsharded_over_sharded"].values()]
    return f"without communication {min(gains):.2f} to {max(gains):.2f} times as fast", found


def machine(device: str) -> dict[str, Any]:
    found = {"python": platform.python_version(), "torch": torch.__version__, "device": device}
    if device == "cuda":
        found |= {
            "device": torch.cuda.get_device_name(),
            "cuda": torch.version.cuda,
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument(
        "--output", type=Path, default=ROOT / "benchmarks" / "results" / "check_gpu.json"
    )
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        print("There is no CUDA device here, so nothing was checked.")
        return
    given.output.parent.mkdir(parents=True, exist_ok=True)
    at = machine(given.device)
    print(", ".join(f"{name} {value}" for name, value in at.items()), flush=True)
    checks, figures = Checks(given.device, 60 * given.minutes), {}

    def real_sizes() -> str:
        said, figures["gpu_rank"] = gpu_rank(given.device, checks.remaining())
        return said

    def graph_of(inner: str) -> str:
        checks.needs_nccl()
        return checks.in_ranks(cuda_graph, inner)

    try:
        checks.run("two ranks on one device", checks.form_group)
        for name in ARCHITECTURES:
            for dtype, inner, tokens in (
                ("float32", "eager", "equal"),
                ("bfloat16", "eager", "equal"),
                ("bfloat16", "eager", "ragged"),
            ):
                case = (name, dtype, inner, tokens, given.device)
                checks.run(" ".join(case[:4]), lambda case=case: checks.in_ranks(numerics, *case))
        checks.run("a rank without tokens", lambda: checks.in_ranks(idle, given.device))
        for inner in ("eager", "inductor"):
            checks.run(f"CUDA graph, {inner}", lambda inner=inner: graph_of(inner))
        checks.run("calibration", lambda: checks.in_ranks(constants, given.device))
        for name in ARCHITECTURES:
            for tokens in ("equal", "ragged"):
                case = (name, "bfloat16", "inductor", tokens, given.device)
                checks.run(" ".join(case[:4]), lambda case=case: checks.in_ranks(numerics, *case))
        checks.end()
        checks.run("gpu_rank", real_sizes)
    finally:
        checks.end()
    count = {s: sum(r.status == s for r in checks.results) for s in ("ok", "FAILED", "skipped")}
    results = [asdict(result) for result in checks.results]
    report = {"machine": at, "backend": checks.backend, "results": results, **figures}
    given.output.write_text(json.dumps(report, indent=2) + "\n")
    print(
        f"{count['ok']} ok, {count['FAILED']} failed, {count['skipped']} skipped; "
        f"written to {given.output}"
    )
    sys.exit(count["FAILED"] > 0)


if __name__ == "__main__":
    main()

"""One rank's compute on a CUDA device, sharded against unsharded, WITHOUT COMMUNICATION.

The collectives go to a fake process group, which returns at once, so one device shows what is
left of a rank's step when the exchange is free: an upper bound of what sharding can gain, and the
cost of the work that sharding adds (k times the tokens through 1/k of every weight). Two parts of
models at their real sizes, random bf16 weights:

    llama-70b    one layer of Llama-3.1-70B; o_proj and FFN sharded
    deepseek-r1  one dense layer and lm_head of DeepSeek-R1 (MLA); o_proj, FFN and lm_head sharded

One token per sequence, attention over that token only: the KV cache is read alike by both and is
left out. Everything is compiled with Inductor and replayed as a CUDA graph; before timing, a
replay must overwrite the whole output, which shows that the rewritten graph can be captured.

Values are not checked: a fake exchange does not bring the other ranks' (tests/ does that). Each
time is a mean over `--calls` replays, and variants take turns. Without a CUDA device this prints a
sentence and ends; `--device cpu --tiny` runs the same code at toy sizes without CUDA graphs.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from common import integers, machine, parser, ratio, report, spread
from torch import fx
from torch._guards import detect_fake_mode
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM, DeepseekV3Config, LlamaConfig, PretrainedConfig

from fgtp_pass.backend.inner import compile_inner
from fgtp_pass.collectives.groups import ComponentGroup
from fgtp_pass.detect.detect import detect
from fgtp_pass.options.options import Options
from fgtp_pass.patterns import BUILTIN
from fgtp_pass.plan.planner import plan_graph
from fgtp_pass.rewrite.rewrite import rewrite
from fgtp_pass.weights.cut import cut_local

SENTINEL = 12345.0
Call = Callable[[], torch.Tensor]


def llama_70b(tiny: bool) -> PretrainedConfig:
    return LlamaConfig(
        num_hidden_layers=1,
        hidden_size=256 if tiny else 8192,
        intermediate_size=512 if tiny else 28672,
        num_attention_heads=16 if tiny else 64,
        num_key_value_heads=8,
        vocab_size=512,  # the table and the head are not part of this measurement
    )


def deepseek_r1(tiny: bool) -> PretrainedConfig:
    # the defaults of DeepseekV3Config are the published shape
    small: dict[str, Any] = {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "vocab_size": 1024,
    }
    return DeepseekV3Config(num_hidden_layers=1, first_k_dense_replace=1, **(small if tiny else {}))


MODELS = {
    "llama-70b": (llama_70b, ("oproj", "mlp")),
    "deepseek-r1": (deepseek_r1, ("oproj", "mlp", "lmhead")),
}


class OneRank:
    """A Dynamo backend that keeps the compiled graph and its inputs, sharded for rank 0 of k."""

    def __init__(self, components: Sequence[str], group: ComponentGroup | None):
        self.sizes = dict.fromkeys(components, group.size if group else 1)
        self.group = group
        self.calls: list[tuple[Callable[..., Any], list[Any]]] = []

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        given, module = list(inputs), gm
        if self.group is not None:
            planned = plan_graph(detect(gm.graph, inputs, BUILTIN), self.sizes, self.group.size)
            found = {site.site.component for site in planned.sites}
            assert found == set(self.sizes), f"sharded {found} of {set(self.sizes)}"
            rewritten = rewrite(gm, planned, {self.group.size: self.group}, {}, ragged=False)
            mode = detect_fake_mode()
            assert mode is not None
            for position, (cut, size) in rewritten.shards.items():
                given[position] = cut_local(inputs[position].data, cut, size, 0)
                mode.from_tensor(given[position], static_shapes=True)
            module = rewritten.module
        compiled = compile_inner(Options(), module, given)
        self.calls.append((compiled, given))
        return lambda *_: compiled(*given)

    def call(self) -> torch.Tensor:
        ((compiled, given),) = self.calls  # one graph
        out: torch.Tensor = compiled(*given)[0]
        return out


def captured(call: Call, name: str) -> Call:
    """The call as a CUDA graph that has been replayed once and has written all its output."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    out.fill_(SENTINEL)
    graph.replay()
    torch.cuda.synchronize()
    assert not bool((out == SENTINEL).any()), f"{name}: the replay did not write its output"

    def replay() -> torch.Tensor:
        graph.replay()
        return out

    return replay


def build(name: str, tiny: bool, device: str) -> Any:
    make, _ = MODELS[name]
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(make(tiny), dtype=torch.bfloat16)
    return model.eval().requires_grad_(False)


def variants(
    model: Any, components: Sequence[str], groups: Sequence[ComponentGroup], ids: torch.Tensor
) -> dict[str, Call]:
    """The unsharded step and the one of each group size; captured on CUDA."""
    made: dict[str, Call] = {}
    for group in (None, *groups):
        name = f"k={group.size}" if group else "unsharded"
        torch._dynamo.reset()
        backend = OneRank(components, group)
        torch.compile(model, backend=backend, dynamic=False)(input_ids=ids, use_cache=False)
        made[name] = captured(backend.call, name) if ids.is_cuda else backend.call
    return made


def timed(call: Call, calls: int, cuda: bool) -> float:
    """Mean seconds of one call among `calls` in a row."""
    if not cuda:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - start) / calls
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3 / calls


@torch.no_grad()
def measure(
    name: str, tokens: int, groups: Sequence[ComponentGroup], given: Any
) -> dict[str, list[float]]:
    """Seconds per step of every variant, which take turns."""
    model = build(name, given.tiny, given.device)
    ids = torch.randint(0, model.config.vocab_size, (tokens, 1), device=given.device)
    steps = variants(model, MODELS[name][1], groups, ids)
    times: dict[str, list[float]] = {variant: [] for variant in steps}
    for repetition in range(-2, given.repetitions):
        for variant, call in steps.items():
            seconds = timed(call, given.calls, ids.is_cuda)
            if repetition >= 0:
                times[variant].append(seconds)
    return times


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    arguments.add_argument("--tiny", action="store_true", help="toy sizes, to try the benchmark")
    arguments.add_argument("--models", default=",".join(MODELS))
    arguments.add_argument("--tokens", type=integers, default=[1, 4, 16, 64, 256])
    arguments.add_argument("--groups", type=integers, default=[2, 4, 8])
    arguments.add_argument("--repetitions", type=int, default=20)
    arguments.add_argument("--calls", type=int, default=20, help="replays per repetition")
    given = arguments.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        print("There is no CUDA device here, so nothing was measured; try --device cpu --tiny.")
        return
    at = machine()
    if given.device == "cpu":
        torch.set_num_threads(1)
    if given.device == "cuda":
        at["device"] = torch.cuda.get_device_name()
    world = max(given.groups)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    groups = []
    for size in given.groups:
        group = dist.new_group(list(range(size)))
        groups.append(ComponentGroup(group.group_name, size, 0, tuple(range(size))))
    rows, results = [], []
    for name in given.models.split(","):
        for tokens in given.tokens:
            times = measure(name, tokens, groups, given)
            gains = {v: ratio(times["unsharded"], t) for v, t in times.items() if v != "unsharded"}
            micro = [f"{statistics.median(values) * 1e6:.1f}" for values in times.values()]
            rows.append([f"{name}, {tokens}", *micro, *gains.values()])
            results.append(
                {
                    "model": name,
                    "tokens_per_rank": tokens,
                    "microseconds": {v: spread(t, scale=1e6) for v, t in times.items()},
                    "unsharded_over_sharded": gains,
                    "cuda_graph": given.device == "cuda",
                }
            )
    columns = ["unsharded", *(f"k={size}" for size in given.groups)]
    report(
        f"One rank's step without communication, {given.device}, bf16: median us, and gain",
        ["model, tokens/rank", *columns, *(f"gain {c}" for c in columns[1:])],
        rows,
        {
            "benchmark": "gpu_rank",
            "communication": "none: fake process group",
            "machine": at,
            "tiny": given.tiny,
            "results": results,
        },
        given.output,
    )


if __name__ == "__main__":
    main()

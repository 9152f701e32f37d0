"""Time that the pass adds to compiling: detect, plan and rewrite on graphs of real sizes.

Models are built on the meta device from the shapes of published ones and traced with Dynamo
(torch.compile with static shapes, gradients off, 1 x 128 tokens), so no weights and no
accelerator are needed. The pass then runs on the graph for data-parallel size 8 over a fake
process group: all components at group size 8. Repetitions of the pass go through all graphs in
turn. The trace is timed once per model. All times are CPU seconds of the one thread that does
either, so that other processes of the machine do not count.

Not measured: sharding the weights, agreeing with other ranks, the inner compiler. DeepSeek-V3 has
16 routed experts in place of 256; experts are one stacked weight per layer, so the graph is the
same size.
"""

import gc
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from common import machine, parser, ratio, report, spread
from torch import fx
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM, DeepseekV3Config, LlamaConfig, PretrainedConfig

from fgtp_pass.collectives.groups import ComponentGroup
from fgtp_pass.detect.detect import detect
from fgtp_pass.options.options import parse_sizes
from fgtp_pass.patterns import BUILTIN
from fgtp_pass.plan.planner import plan_graph
from fgtp_pass.rewrite.rewrite import rewrite

WORLD = 8
TOKENS = 128


def _llama(layers: int, hidden: int, ffn: int, heads: int) -> LlamaConfig:
    return LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_attention_heads=heads,
        num_key_value_heads=8,
        vocab_size=128256,
    )


MODELS: dict[str, Callable[[], PretrainedConfig]] = {
    "Llama-3.1-8B": lambda: _llama(32, 4096, 14336, 32),
    "Llama-3.1-70B": lambda: _llama(80, 8192, 28672, 64),
    "Llama-3.1-405B": lambda: _llama(126, 16384, 53248, 128),
    # the defaults of DeepseekV3Config are the published shape
    "DeepSeek-V3": lambda: DeepseekV3Config(n_routed_experts=16, n_group=4, topk_group=2),
}


@dataclass(eq=False)
class Traced:
    """A graph as Dynamo hands it to a backend, and what making it cost."""

    module: fx.GraphModule
    inputs: Sequence[Any]
    seconds: float


def trace(config: PretrainedConfig) -> Traced:
    """Trace one prefill of the model; only its forward through Dynamo is timed."""
    with torch.device("meta"):
        extra = {"experts_implementation": "batched_mm"} if config.model_type != "llama" else {}
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, **extra).eval()
        ids = torch.zeros(1, TOKENS, dtype=torch.long)
    seen: list[tuple[fx.GraphModule, Sequence[Any]]] = []
    pass_began = 0.0

    def capture(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        nonlocal pass_began
        pass_began = time.thread_time()
        seen.append((gm, list(example_inputs)))
        return lambda *args: tuple(
            n.meta["example_value"] if isinstance(n, fx.Node) else n
            for n in gm.graph.output_node().args[0]
        )

    torch._dynamo.reset()
    start = time.thread_time()
    with torch.no_grad():
        torch.compile(model, backend=capture, dynamic=False)(input_ids=ids, use_cache=False)
    if len(seen) != 1:
        raise RuntimeError(f"expected one graph, got {len(seen)}")
    return Traced(*seen[0], seconds=pass_began - start)


def run_pass(traced: Traced) -> dict[str, float]:
    """Seconds of each part of the pass on one graph, and how many sites it found."""
    sizes = parse_sizes({p.config_key: WORLD for p in BUILTIN}).resolve(WORLD, WORLD)
    group = ComponentGroup(
        name=dist.group.WORLD.group_name, size=WORLD, rank=0, ranks=tuple(range(WORLD))
    )
    times = [time.thread_time()]
    detection = detect(traced.module.graph, traced.inputs, BUILTIN)
    times.append(time.thread_time())
    planned = plan_graph(detection, sizes, WORLD)
    times.append(time.thread_time())
    rewrite(traced.module, planned, {WORLD: group}, {}, ragged=False)
    times.append(time.thread_time())
    parts = [b - a for a, b in itertools.pairwise(times)]
    names = ("detect", "plan", "rewrite")
    return dict(zip(names, parts, strict=True)) | {
        "total": sum(parts),
        "sites": len(planned.sites),
    }


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--models", default=",".join(MODELS), help="some of these, by comma")
    arguments.add_argument("--repetitions", type=int, default=3)
    arguments.add_argument("--profile", action="store_true", help="profile the last model instead")
    given = arguments.parse_args()
    names = given.models.split(",")
    at = machine()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=WORLD)
    graphs: dict[str, Traced] = {}
    for name in names:
        graphs[name] = trace(MODELS[name]())
        gc.collect()
    if given.profile:
        profile(graphs[names[-1]])
        return
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for repetition in range(-1, given.repetitions):
        for name in names:
            measured = run_pass(graphs[name])
            if repetition >= 0:
                runs[name].append(measured)
    rows, results = [], []
    for name in names:
        nodes = len(graphs[name].module.graph.nodes)
        traced = graphs[name].seconds
        parts = {
            part: spread([run[part] for run in runs[name]], scale=1)
            for part in ("detect", "plan", "rewrite", "total")
        }
        total = parts["total"]["median"]
        share = ratio([total], [traced])
        medians = [f"{parts[p]['median']:.3f}" for p in ("detect", "plan", "rewrite")]
        rows.append(
            [
                name,
                nodes,
                int(runs[name][0]["sites"]),
                f"{traced:.2f}",
                *medians,
                f"{total:.3f} [{parts['total']['min']:.3f}-{parts['total']['max']:.3f}]",
                f"{total / nodes * 1e6:.0f}",
                f"{share:.1%}",
            ]
        )
        results.append(
            {
                "model": name,
                "nodes": nodes,
                "sites": int(runs[name][0]["sites"]),
                "trace_cpu_seconds": round(traced, 3),
                "cpu_seconds": parts,
                "microseconds_per_node": round(total / nodes * 1e6, 1),
                "share_of_trace": share,
            }
        )
    report(
        f"The pass at compile time, data-parallel size {WORLD}: CPU seconds, medians",
        ["model", "nodes", "sites", "trace", "detect", "plan", "rewrite", "total [min-max]",
         "us/node", "of trace"],
        rows,
        {"benchmark": "compile_time", "machine": at, "results": results},
        given.output,
    )  # fmt: skip


def profile(traced: Traced) -> None:
    """Print where the time of one run of the pass goes."""
    import cProfile
    import pstats

    run_pass(traced)
    profiler = cProfile.Profile()
    profiler.runcall(run_pass, traced)
    stats = pstats.Stats(profiler)
    stats.sort_stats("cumulative").print_stats(45)
    stats.sort_stats("tottime").print_stats(20)


if __name__ == "__main__":
    main()

"""One decode step on two ranks: plain data parallelism against the pass and the same by hand.

Every rank is a process with one thread, pinned to one core, over gloo on 127.0.0.1. Every rank
decodes one token for each of its own sequences (`--tokens` of them) of a Llama-like model with
random weights, over a static cache of 64 positions. Variants, interleaved in one run:

    dp          plain data parallelism as torch gives it: the whole model on every rank, compiled
                with Inductor
    dp-packed   dp with every linear's weight packed like the pass packs its shards (also q, k and
                v, which the pass leaves whole and plain). What the pass gains over this, and not
                over dp, is gained by sharding
    dtensor     the same sharding written by hand with DTensor's parallelize_module, compiled, as
                torch gives it
    pass        this pass, token counts checked before every step (the default)
    pass-nochk  this pass, check_tokens=False
    floor       the sharded matmuls on the packed shards of the pass and the collectives, and the
                unsharded q, k and v, in a bare eager loop: no attention, norms, activations,
                cache, guards. Nothing can be faster that does the same matmuls with the same
                collectives.

A step is timed from a barrier to its end, on the rank that ends later. Not measured: prefill,
sampling, a network (loopback only), more ranks than cores. The logits of all variants but the
floor are compared before anything is timed.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from common import (
    Times,
    add_realtime,
    integers,
    interleave,
    machine,
    parser,
    ratio,
    report,
    run_ranks,
    shown,
    slower_rank,
    spread,
)
from torch import nn
from torch.distributed.tensor import DeviceMesh, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

import fgtp_pass
from fgtp_pass import packing, weights

WORLD = 2
POSITIONS, POSITION = 64, 48  # length of the static cache, and where the step writes
SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
}
TINY = SHAPE | {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 512}
VARIANTS = ("dp", "dp-packed", "dtensor", "pass", "pass-nochk", "floor")
PAIRS = (  # whose times are divided
    ("dp", "pass"),
    ("dp-packed", "pass"),
    ("dtensor", "pass"),
    ("pass", "floor"),
    ("pass-nochk", "floor"),
)
COMPONENTS = ("embedding", "lmhead", "oproj", "mlp")
# largest difference over largest logit; half precision rounds after every op
TOLERANCE = {"float32": 1e-4, "bfloat16": 4e-2}


class PackedLinear(nn.Linear):
    """A linear whose weight is packed as the pass packs shards."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.ops.fgtp_pass.linear(x, self.weight, self.bias)
        return out


def pack_linears(model: nn.Module) -> nn.Module:
    """Every linear of the model packed, whole as it is, where the pass would pack its shards."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and packing.supports(module.weight):
            packing.pack(module.weight)
            module.__class__ = PackedLinear
    return model


def build(shape: dict[str, int], dtype: torch.dtype) -> LlamaForCausalLM:
    """The same random model on every rank and in every variant."""
    torch.manual_seed(0)
    config = LlamaConfig(**shape, dtype=dtype, max_position_embeddings=POSITIONS)
    return LlamaForCausalLM(config).to(dtype).eval().requires_grad_(False)


def by_hand(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """The plan of the pass, written with DTensor styles; dim 0 of the inputs is the tokens.

    Every site takes this rank's own tokens, Shard(0), and gives them back as Shard(0): DTensor
    inserts the collectives that the layouts ask for.
    """
    own = Shard(0)
    plan: dict[str, Any] = {
        "model.embed_tokens": RowwiseParallel(input_layouts=own, output_layouts=own),
        "lm_head": ColwiseParallel(input_layouts=own, output_layouts=own),
    }
    for i in range(len(model.model.layers)):  # type: ignore[arg-type, union-attr]
        layer = f"model.layers.{i}"
        plan |= {
            f"{layer}.self_attn.o_proj": ColwiseParallel(input_layouts=own, output_layouts=own),
            f"{layer}.mlp": PrepareModuleInput(
                input_layouts=own, desired_input_layouts=Replicate()
            ),
            f"{layer}.mlp.gate_proj": ColwiseParallel(),
            f"{layer}.mlp.up_proj": ColwiseParallel(),
            f"{layer}.mlp.down_proj": RowwiseParallel(output_layouts=own),
        }
    return parallelize_module(model, mesh, plan)


def decoder(model: Any, config: LlamaConfig, ids: torch.Tensor) -> Callable[[], torch.Tensor]:
    """A call that runs the step at POSITION and gives its logits, every time the same."""
    cache = StaticCache(config=config, max_cache_len=POSITIONS)
    heads, dim = config.num_key_value_heads, config.head_dim
    cache.early_initialization(ids.shape[0], heads, dim, config.dtype, torch.device("cpu"))
    generator = torch.Generator().manual_seed(dist.get_rank())
    for layer in cache.layers:
        layer.keys.copy_(torch.randn(layer.keys.shape, generator=generator))
        layer.values.copy_(torch.randn(layer.values.shape, generator=generator))

    def step() -> torch.Tensor:
        for layer in cache.layers:
            layer.cumulative_length.fill_(POSITION)
        out: torch.Tensor = model(input_ids=ids, past_key_values=cache, use_cache=True).logits
        return out

    return step


_FFN = ("gate", "up", "down")


class Floor:
    """The matmuls and collectives of one step, on the shards of a model that the pass sharded."""

    def __init__(self, model: nn.Module, ids: torch.Tensor):
        config = model.config
        self.ids, self.tokens = ids.flatten(), ids.numel()
        self.hidden, self.layers = int(config.hidden_size), int(config.num_hidden_layers)
        self.w = {name: _as_held(value) for name, value in model.named_parameters()}
        self.group = dist.group.WORLD.group_name
        self.x = torch.randn(self.tokens, self.hidden).to(config.dtype)
        self.collectives = 0

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        self.collectives += 1
        op = torch.ops._c10d_functional.all_gather_into_tensor
        return self.wait(op(x, WORLD, self.group))

    def exchange(self, x: torch.Tensor) -> torch.Tensor:
        self.collectives += 1
        splits = [self.tokens] * WORLD
        op = torch.ops._c10d_functional.all_to_all_single
        return self.wait(op(x, splits, splits, self.group))

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        return self.exchange(x).view(WORLD, self.tokens, self.hidden).sum(0)

    @staticmethod
    def wait(x: torch.Tensor) -> torch.Tensor:
        waited: torch.Tensor = torch.ops._c10d_functional.wait_tensor(x)
        return waited

    def __call__(self) -> torch.Tensor:
        table = self.w["model.embed_tokens.weight"]
        ids = self.gather(self.ids) % table.shape[0]
        self.sum(F.embedding(ids, table))
        x = self.x  # the values do not matter, the shapes do
        for i in range(self.layers):
            w = {k: self.w[f"model.layers.{i}.{k}.weight"] for k in _MATMULS}
            q, _, _ = (_linear(x, w[f"self_attn.{name}_proj"]) for name in "qkv")
            self.exchange(_linear(self.gather(q), w["self_attn.o_proj"]))
            every = self.gather(x)
            gate, _ = (_linear(every, w[f"mlp.{name}_proj"]) for name in _FFN[:2])
            self.sum(_linear(gate, w["mlp.down_proj"]))
        return self.exchange(_linear(self.gather(x), self.w["lm_head.weight"]))


_MATMULS = (*(f"self_attn.{n}_proj" for n in "qkvo"), *(f"mlp.{n}_proj" for n in _FFN))


def _as_held(parameter: nn.Parameter) -> torch.Tensor:
    """A shard as the pass holds it, packed where it packs; a whole parameter as it is."""
    record = weights.record_of(parameter)
    return parameter if record is None else record.shard


def _linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = torch.ops.fgtp_pass.linear(x, weight, None)
    return out


def difference(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


@torch.no_grad()
def rank_main(
    shape: dict[str, int],
    dtype: str,
    counts: list[int],
    names: list[str],
    repetitions: int,
    at_realtime: bool,
) -> list[dict[str, Any]]:
    """On every rank: per token count the times of the variants and the errors of the logits."""
    # shared CPUs: a compile of the other rank must not look like a hang, and no pool of compilers
    torch._inductor.config.compile_threads = 1
    warnings.filterwarnings("ignore")
    floating = getattr(torch, dtype)
    mesh = dist.init_device_mesh("cpu", (WORLD,))
    models = {"dp": build(shape, floating)}
    if "dp-packed" in names:
        models["dp-packed"] = pack_linears(build(shape, floating))
    if "dtensor" in names:
        models["dtensor"] = by_hand(build(shape, floating), mesh)
    models["pass"] = build(shape, floating)
    config = models["dp"].config
    options = {"finegrained_tp_config": {f"{c}_tensor_parallel_size": WORLD for c in COMPONENTS}}
    results = []
    for count in counts:
        torch._dynamo.reset()
        generator = torch.Generator().manual_seed(100 + dist.get_rank())
        ids = torch.randint(0, shape["vocab_size"], (count, 1), generator=generator)
        steps: dict[str, Callable[[], Any]] = {}
        for name in names:
            if name == "floor":
                continue
            model = models[name.removesuffix("-nochk")]
            if name.startswith("pass"):
                chosen = options | {"check_tokens": name == "pass"}
                compiled = torch.compile(
                    model, backend=fgtp_pass.fgtp_backend, options=chosen, dynamic=False
                )
            else:
                compiled = torch.compile(model, dynamic=False)
            steps[name] = decoder(compiled, config, ids)
        logits = {name: step().float() for name, step in steps.items()}  # compiles
        errors = {name: difference(value, logits["dp"]) for name, value in logits.items()}
        bad = {n: e for n, e in errors.items() if not e < TOLERANCE[dtype]}
        assert not bad, f"the logits differ from plain data parallelism: {bad}"
        if "floor" in names:
            floor = Floor(models["pass"], ids)
            floor()
            plan = fgtp_pass.applied_plan(models["pass"])
            assert plan is not None
            assert floor.collectives == plan.collectives_per_step
            steps["floor"] = floor
        compiles = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        times = interleave(steps, repetitions, 3, dist.barrier, at_realtime)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiles, "recompiled"
        results.append({"tokens": count, "times": times, "errors": errors})
    return results


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--dtype", choices=sorted(TOLERANCE), default="float32")
    arguments.add_argument("--tokens", type=integers, default=[1, 2, 4, 8, 16, 32])
    arguments.add_argument("--variants", default=",".join(VARIANTS))
    arguments.add_argument("--repetitions", type=int, default=24)
    add_realtime(arguments)
    arguments.add_argument("--tiny", action="store_true", help="a toy model, to try the benchmark")
    given = arguments.parse_args()
    names = [name for name in VARIANTS if name in given.variants.split(",")]
    if not {"dp", "pass"} <= set(names):
        arguments.error("--variants must have dp, to compare with, and pass, to shard")
    shape = TINY if given.tiny else SHAPE
    at = machine()
    per_rank = run_ranks(
        WORLD,
        rank_main,
        shape,
        given.dtype,
        given.tokens,
        names,
        given.repetitions,
        given.realtime,
    )
    rows, results = [], []
    for together in zip(*per_rank, strict=True):
        times: Times = slower_rank([one["times"] for one in together])
        spreads = {name: spread(values) for name, values in times.items()}
        ratios = {f"{a}/{b}": ratio(times[a], times[b]) for a, b in PAIRS if {a, b} <= set(times)}
        rows.append([together[0]["tokens"], *(shown(spreads[n]) for n in names), *ratios.values()])
        worst = {n: max(one["errors"][n] for one in together) for n in together[0]["errors"]}
        results.append(
            {
                "tokens_per_rank": together[0]["tokens"],
                "milliseconds": spreads,
                "ratios": ratios,
                "logit_errors_relative_to_dp": worst,
            }
        )
    report(
        f"One decode step, {WORLD} ranks, {given.dtype}: ms of the slower rank, median [p10-p90]",
        ["tokens/rank", *names, *ratios],
        rows,
        {
            "benchmark": "decode_step",
            "machine": at | {"realtime": given.realtime},
            "model": shape | {"dtype": given.dtype},
            "cache_positions": POSITIONS,
            "results": results,
        },
        given.output,
    )


if __name__ == "__main__":
    main()

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
    pass-apart  this pass, each site by itself: four messages per layer in place of three
    floor       what any variant has (attention over the cache, norms, activations, residual adds),
                with the matmuls on the packed shards of the pass and its collectives, compiled with
                Inductor: no guards, no host's own work, no masks, no rotary embedding, no cache
                to be written. Nothing can be faster that does the same with the same collectives
    no-messages the floor without its collectives, on as many rows: wrong, and what they cost

A step is timed from a barrier to its end, on the rank that ends later. Not measured: prefill,
sampling, a network (loopback only), more ranks than cores. The logits of all variants but the
floor are compared before anything is timed.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from common import (
    add_realtime,
    compared,
    integers,
    interleave,
    machine,
    parser,
    report,
    run_ranks,
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
from fgtp_pass.algebra.path import Path
from fgtp_pass.algebra.placement import Placement
from fgtp_pass.algebra.price import by_messages
from fgtp_pass.backend import runtime
from fgtp_pass.plan.planner import PlannedGraph, plan_graph
from fgtp_pass.plan.prices import Prices
from fgtp_pass.weights import packing
from fgtp_pass.weights.sharded_parameter import record_of

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
VARIANTS = (
    "dp",
    "dp-packed",
    "dtensor",
    "pass",
    "pass-nochk",
    "pass-apart",
    "floor",
    "no-messages",
)
FLOORS = ("floor", "no-messages")
PAIRS = (  # whose times are divided
    ("dp", "pass"),
    ("dp-packed", "pass"),
    ("dtensor", "pass"),
    ("pass-apart", "pass"),
    ("pass", "floor"),
    ("pass-nochk", "floor"),
    ("floor", "no-messages"),
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
_MATMULS = (*(f"self_attn.{n}_proj" for n in "qkvo"), *(f"mlp.{n}_proj" for n in _FFN))


class Floor:
    """The work of one step on the shards of a model that the pass sharded, with its collectives.

    The values do not matter, the shapes do. moving: whether the collectives run; without them each
    rank takes its own rows for those of all.
    """

    def __init__(self, model: nn.Module, ids: torch.Tensor, moving: bool):
        config = model.config
        self.ids, self.tokens, self.moving = ids.flatten(), ids.numel(), moving
        self.hidden, self.layers = int(config.hidden_size), int(config.num_hidden_layers)
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.w = {name: _as_held(value) for name, value in model.named_parameters()}
        self.group = dist.group.WORLD.group_name
        head_dim = int(config.head_dim)
        shape = (self.tokens, self.kv_heads, POSITIONS, head_dim)
        self.keys = [torch.randn(shape).to(config.dtype) for _ in range(self.layers)]
        self.norm = torch.ones(self.hidden, dtype=config.dtype)
        self.collectives = 0
        self.run = torch.compile(self._step, dynamic=False)

    def __call__(self) -> torch.Tensor:
        out: torch.Tensor = self.run(self.ids)
        return out

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        self.collectives += 1
        if not self.moving:
            return torch.cat([x] * WORLD)
        op = torch.ops._c10d_functional.all_gather_into_tensor
        return self.wait(op(x, WORLD, self.group))

    def exchange(self, x: torch.Tensor) -> torch.Tensor:
        self.collectives += 1
        if not self.moving:
            return x.clone()
        splits = [self.tokens] * WORLD
        op = torch.ops._c10d_functional.all_to_all_single
        return self.wait(op(x, splits, splits, self.group))

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        return self.exchange(x).view(WORLD, self.tokens, self.hidden).sum(0)

    def sum_for_all(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """The residual is added to the own rows; half precision is added in fp32."""
        padded = F.pad(residual.float(), (0, 0, 0, (WORLD - 1) * self.tokens))
        parts = self.gather(x.float() + padded).view(WORLD, -1, self.hidden)
        return parts.sum(0).to(x.dtype)

    @staticmethod
    def wait(x: torch.Tensor) -> torch.Tensor:
        waited: torch.Tensor = torch.ops._c10d_functional.wait_tensor(x)
        return waited

    def normed(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (self.hidden,), self.norm, 1e-6)

    def attention(self, x: torch.Tensor, layer: int, w: dict[str, torch.Tensor]) -> torch.Tensor:
        q, k, v = (_linear(x, w[f"self_attn.{name}_proj"]) for name in "qkv")
        q = q.view(self.tokens, 1, self.heads, -1).transpose(1, 2)
        keys = self.keys[layer]
        q = q + (k.sum() + v.sum()) * 0  # k and v, which would be written to the cache, are made
        out = F.scaled_dot_product_attention(q, keys, keys, enable_gqa=True)
        return out.transpose(1, 2).reshape(self.tokens, -1)

    def _step(self, ids: torch.Tensor) -> torch.Tensor:
        self.collectives = 0
        table = self.w["model.embed_tokens.weight"]
        x = self.sum(F.embedding(self.gather(ids) % table.shape[0], table))
        for i in range(self.layers):
            w = {k: self.w[f"model.layers.{i}.{k}.weight"] for k in _MATMULS}
            heads = self.attention(self.normed(x), i, w)
            cut = (
                heads.view(self.tokens, WORLD, -1).transpose(0, 1).reshape(WORLD * self.tokens, -1)
            )
            o = _linear(self.exchange(cut), w["self_attn.o_proj"])
            every = self.sum_for_all(o, x)
            x = every[: self.tokens]
            inner = self.normed(every)
            gate, up = (_linear(inner, w[f"mlp.{name}_proj"]) for name in ("gate", "up"))
            down = _linear(F.silu(gate) * up, w["mlp.down_proj"])
            if i + 1 < self.layers:
                x = x + self.sum(down)
            else:
                every = self.sum_for_all(down, x)
        return self.exchange(_linear(self.normed(every), self.w["lm_head.weight"]))


@contextmanager
def apart() -> Iterator[None]:
    """Within it the pass gives each site a path of its own, from own tokens to own tokens."""

    def price(path: Path) -> tuple[float, ...]:
        joined = path.start is not Placement.OWN or path.end is not Placement.OWN
        return (joined, *by_messages(path))

    def plan(*args: Any, prices: Prices, joins: bool) -> PlannedGraph:
        return plan_graph(*args, prices=Prices(at=lambda tokens: lambda match: price), joins=joins)

    with mock.patch.object(runtime, "plan_graph", plan):
        yield


def _as_held(parameter: nn.Parameter) -> torch.Tensor:
    """A shard as the pass holds it, packed where it packs; a whole parameter as it is."""
    record = record_of(parameter)
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
    if "pass-apart" in names:
        models["pass-apart"] = build(shape, floating)
    config = models["dp"].config
    options = {"finegrained_tp_config": {f"{c}_tensor_parallel_size": WORLD for c in COMPONENTS}}
    results = []
    for count in counts:
        torch._dynamo.reset()
        generator = torch.Generator().manual_seed(100 + dist.get_rank())
        ids = torch.randint(0, shape["vocab_size"], (count, 1), generator=generator)
        steps: dict[str, Callable[[], Any]] = {}
        for name in names:
            if name in FLOORS:
                continue
            model = models[name.removesuffix("-nochk")]
            if name.startswith("pass"):
                chosen = options | {"check_tokens": name != "pass-nochk"}
                if name == "pass-apart":
                    chosen["timeout_seconds"] = 599  # other options: other plans
                compiled = torch.compile(
                    model, backend=fgtp_pass.fgtp_backend, options=chosen, dynamic=False
                )
            else:
                compiled = torch.compile(model, dynamic=False)
            steps[name] = decoder(compiled, config, ids)
        logits = {}
        for name, step in steps.items():
            with apart() if name == "pass-apart" else nullcontext():
                logits[name] = step().float()  # compiles
        errors = {name: difference(value, logits["dp"]) for name, value in logits.items()}
        bad = {n: e for n, e in errors.items() if not e < TOLERANCE[dtype]}
        assert not bad, f"the logits differ from plain data parallelism: {bad}"
        for name in [name for name in names if name in FLOORS]:
            floor = Floor(models["pass"], ids, moving=name == "floor")
            floor._step(floor.ids)
            plan = fgtp_pass.applied_plan(models["pass"])
            assert plan is not None
            assert floor.collectives == plan.collectives_per_step
            steps[name] = floor
            floor()  # compiles
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
    pairs = [pair for pair in PAIRS if {*pair} <= {*names}]
    columns, rows, results = compared(per_rank, names, pairs)
    report(
        f"One decode step, {WORLD} ranks, {given.dtype}: ms of the slower rank, median [p10-p90]",
        columns,
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

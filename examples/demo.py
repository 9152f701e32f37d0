"""Two ranks decode a Llama of 0.3 B random parameters, unsharded and sharded by fgtp_pass.

    python examples/demo.py            # about two minutes on two cores
    python examples/demo.py --tiny     # a toy model, to try the machinery

Exits with status 1 if the sharded model gives other tokens, or if a rank fails or hangs.
"""

import argparse
import gc
import logging
import os
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import psutil
import torch
import torch.distributed as dist
import two_ranks
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

import fgtp_pass
from fgtp_pass import fgtp_backend
from fgtp_pass.plan.plan import Plan, format_bytes

RANKS = 2
TIMEOUT_SECONDS = 900.0  # for a hang: two minutes are usual


@dataclass(frozen=True)
class Setting:
    """What to run: the model's size, the batch of each rank, and what compiles the graphs."""

    hidden: int = 1792
    ffn: int = 7168
    layers: int = 4
    vocabulary: int = 32000
    batch: int = 4
    prompt: int = 16
    new_tokens: int = 24
    inner: str = "auto"


TINY = Setting(hidden=64, ffn=192, layers=2, vocabulary=512, batch=2, prompt=5, new_tokens=6)


@dataclass(frozen=True)
class Decoded:
    """The tokens [new_tokens, batch] and the seconds of each decode step."""

    tokens: torch.Tensor
    step_seconds: list[float]


def rank_main(setting: Setting) -> bool:
    """One rank's part; returns whether the tokens are the same."""
    demo = Demo(setting)
    if setting.inner == "auto":
        setting = Setting(**{**vars(setting), "inner": demo.working_inner_backend()})
    model = demo.build(setting)
    cache = StaticCache(config=model.config, max_cache_len=setting.prompt + setting.new_tokens + 1)
    head_dim = model.config.head_dim
    cache.early_initialization(
        setting.batch, model.config.num_key_value_heads, head_dim, torch.float32, "cpu"
    )
    generator = torch.Generator().manual_seed(1000 + dist.get_rank())
    shape = (setting.batch, setting.prompt)
    prompts = torch.randint(0, setting.vocabulary, shape, generator=generator)

    def decode(run: Any) -> Decoded:
        return greedy(run, prompts, cache, setting.new_tokens)

    with demo.stage("unsharded, not compiled: decoding"):
        eager = decode(model)
    plain = torch.compile(model, backend=setting.inner, dynamic=False)
    with demo.stage(f"unsharded, {setting.inner}: compiling prefill and decode step"):
        greedy(plain, prompts, cache, new_tokens=2)
    with demo.stage(f"unsharded, {setting.inner}: decoding"):
        baseline = decode(plain)
    del plain
    torch._dynamo.reset()
    gc.collect()
    before = footprint(model)

    fast = torch.compile(
        model, backend=fgtp_backend, dynamic=False, options={"inner_backend": setting.inner}
    )
    with demo.stage(f"fgtp_pass, {setting.inner}: detecting, sharding, compiling both graphs"):
        greedy(fast, prompts, cache, new_tokens=2)
    with demo.stage(f"fgtp_pass, {setting.inner}: decoding"):
        sharded = decode(fast)
    gc.collect()
    after = footprint(fast)

    plan = fgtp_pass.applied_plan(fast)
    assert plan is not None
    names = (
        "unsharded, not compiled",
        f"unsharded, {setting.inner}",
        f"fgtp_pass, {setting.inner}",
    )
    runs = dict(zip(names, (eager, baseline, sharded), strict=True))
    same = torch.equal(eager.tokens, sharded.tokens) and torch.equal(
        baseline.tokens, sharded.tokens
    )
    demo.report(plan, before, after, runs, same)
    return same


@torch.no_grad()
def greedy(model: Any, prompts: torch.Tensor, cache: StaticCache, new_tokens: int) -> Decoded:
    """Prefill, then one token at a time."""
    cache.reset()
    tokens, seconds = [], []
    fed, done = prompts, 0
    for _ in range(new_tokens):
        dist.barrier()
        start = time.perf_counter()
        positions = torch.arange(done, done + fed.shape[1])
        # made here, as `generate` does: made in the model it would break the graph
        mask = torch.arange(cache.get_max_length()) <= positions[:, None]
        out = model(
            input_ids=fed,
            attention_mask=mask.expand(len(fed), 1, -1, -1),
            position_ids=positions[None],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        done += fed.shape[1]
        fed = out.logits[:, -1].argmax(-1, keepdim=True)
        seconds.append(time.perf_counter() - start)
        tokens.append(fed[:, 0])
    return Decoded(torch.stack(tokens), seconds[1:])


def footprint(model: nn.Module) -> tuple[int, int]:
    """Bytes of weights on this rank, and resident memory of this process."""
    resident = psutil.Process().memory_info().rss  # first: packed shards come as copies below
    weights = fgtp_pass.shard_state_dict(model).values()
    storages = {w.untyped_storage().data_ptr(): w.untyped_storage().nbytes() for w in weights}
    return sum(storages.values()), resident


class Demo:
    """Progress and results, printed by rank 0."""

    def __init__(self, setting: Setting):
        self.setting = setting
        self.quiet = dist.get_rank() != 0
        self.console = Console(quiet=self.quiet)
        if not self.console.is_terminal:
            self.console.width = 120
        self.start = time.perf_counter()
        self.load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
        if not self.quiet:
            logger = logging.getLogger("fgtp_pass")
            logger.setLevel(logging.INFO)
            logger.addHandler(_ToConsole(self))

    def say(self, text: str) -> None:
        self.console.print(f"[dim]{time.perf_counter() - self.start:6.1f} s[/]  {text}")

    def stage(self, text: str) -> "_Stage":
        return _Stage(self, text)

    def working_inner_backend(self) -> str:
        """Gives "inductor", or "eager" where there is no C++ compiler that Inductor could use."""
        with self.stage("trying Inductor"):
            try:
                torch.compile(lambda x: x.sin() + 1, backend="inductor")(torch.ones(8))
                return "inductor"
            except Exception as error:
                why = str(error).splitlines()[0]
        self.say(f"Inductor does not work here, so graphs run uncompiled ({why})")
        return "eager"

    def build(self, setting: Setting) -> LlamaForCausalLM:
        config = LlamaConfig(
            hidden_size=setting.hidden,
            intermediate_size=setting.ffn,
            num_hidden_layers=setting.layers,
            num_attention_heads=setting.hidden // (16 if setting.hidden < 256 else 128),
            vocab_size=setting.vocabulary,
            max_position_embeddings=512,
            bos_token_id=None,
            eos_token_id=None,
        )
        with self.stage("building the model with random weights"):
            torch.manual_seed(0)  # every rank has the same weights
            model = LlamaForCausalLM(config).eval()
        count = sum(p.numel() for p in model.parameters())
        size = f"{count / 1e9:.2f} B" if count > 5e6 else f"{count / 1e6:.2f} M"
        self.say(
            f"Llama, {size} parameters, {RANKS} ranks with {setting.batch} prompts each, "
            f"{torch.get_num_threads()} thread(s) per rank"
        )
        return model

    def report(
        self,
        plan: Plan,
        before: tuple[int, int],
        after: tuple[int, int],
        runs: dict[str, Decoded],
        same: bool,
    ) -> None:
        """Collective: what every rank measured, printed by rank 0."""
        medians = [statistics.median(run.step_seconds) for run in runs.values()]
        mine = {"before": before, "after": after, "medians": medians, "same": same}
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, mine)
        self.console.print()
        self.console.print(plan_table(plan))
        self.console.print(memory_table(ranks))
        self.console.print(speed_table(list(runs), ranks, self.setting.batch))
        if self.load > 0.75 * (os.cpu_count() or 1):
            self.console.print(
                f"The machine was busy when this started (load {self.load:.1f} on "
                f"{os.cpu_count()} cores), so the times above say little: a collective waits for "
                "the slower rank."
            )
        count = self.setting.new_tokens * self.setting.batch
        for rank, said in enumerate(ranks):
            verdict = "[green]the same[/]" if said["same"] else "[bold red]DIFFERENT[/]"
            self.console.print(f"rank {rank}: all {count} tokens of the three runs are {verdict}")


class _Stage:
    """A step of the demo: a spinner in a terminal, a line with its time when it is done."""

    def __init__(self, demo: Demo, text: str):
        self.demo, self.text = demo, text
        self.status = demo.console.status(text)

    def __enter__(self) -> None:
        if not self.demo.console.is_terminal:
            self.demo.say(f"{self.text} ...")
        self.begun = time.perf_counter()
        self.status.start()

    def __exit__(self, failed: object, *_: object) -> None:
        self.status.stop()
        if failed is None:
            self.demo.say(f"{self.text}: done in {time.perf_counter() - self.begun:.1f} s")


class _ToConsole(logging.Handler):
    def __init__(self, demo: Demo):
        super().__init__()
        self.demo = demo

    def emit(self, record: logging.LogRecord) -> None:
        self.demo.say(f"fgtp_pass: {record.getMessage()}")


# tables -----------------------------------------------------------------------------------------


def plan_table(plan: Plan) -> Table:
    table = Table(title=f"plan {plan.fingerprint}, bytes freed per rank")
    table.add_column("component")
    for name in ("sites", "group\nsize"):
        table.add_column(name, justify="right")
    table.add_column("path", min_width=17)  # its longest word
    table.add_column("freed", justify="right")
    table.add_column("collectives\nper step", justify="right")
    for key in dict.fromkeys((s.component, s.group_size, s.path) for s in plan.sites):
        sites = [s for s in plan.sites if (s.component, s.group_size, s.path) == key]
        cuts = {w.fqn: w for s in sites for w in s.weights if w.cut_dim is not None}
        freed = sum(w.bytes_saved(key[1]) for w in cuts.values())
        counts = Counter(c for s in sites for c in s.collectives)
        table.add_row(
            key[0],
            str(len(sites)),
            str(key[1]),
            escape(key[2]),
            format_bytes(freed),
            "\n".join(f"{n} {name}" for name, n in counts.items()),
        )
    table.add_section()
    total = format_bytes(plan.bytes_saved_per_rank)
    table.add_row("total", str(len(plan.sites)), "", "", total, str(plan.collectives_per_step))
    return table


def memory_table(ranks: list[Any]) -> Table:
    table = Table("memory", title="memory per rank")
    for name in ("before", "after", "freed"):
        table.add_column(name, justify="right")
    for rank, said in enumerate(ranks):
        for i, what in enumerate(("weights", "resident")):
            before, after = said["before"][i], said["after"][i]
            cells = (format_bytes(before), format_bytes(after), format_bytes(before - after))
            table.add_row(f"rank {rank}, {what}", *cells)
    return table


def speed_table(names: list[str], ranks: list[Any], batch: int) -> Table:
    table = Table("run", title="decoding")
    for name in ("step, median", "tokens/s, all ranks", "against the compiled one"):
        table.add_column(name, justify="right")
    speeds = [sum(batch / said["medians"][i] for said in ranks) for i in range(len(names))]
    for i, name in enumerate(names):
        step = max(said["medians"][i] for said in ranks)
        ratio = speeds[i] / speeds[1]
        table.add_row(name, f"{1000 * step:.1f} ms", f"{speeds[i]:.1f}", f"{ratio:.2f}x")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tiny", action="store_true", help="a toy model")
    parser.add_argument(
        "--inner",
        default="auto",
        help="what compiles the graphs: a Dynamo backend (default: inductor if it works here)",
    )
    options = parser.parse_args()
    setting = TINY if options.tiny else Setting()
    setting = Setting(**{**vars(setting), "inner": options.inner})
    same = two_ranks.run(rank_main, setting, timeout=TIMEOUT_SECONDS, world=RANKS)
    if not all(same):
        sys.exit("the sharded model gave other tokens than the unsharded one.")


if __name__ == "__main__":
    main()

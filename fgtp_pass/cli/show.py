"""Reports as rich tables."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fgtp_pass.cost.estimate import Row
from fgtp_pass.cost.hardware import Hardware
from fgtp_pass.cost.memory import Memory
from fgtp_pass.cost.report import Report
from fgtp_pass.plan import format_bytes

if TYPE_CHECKING:
    from fgtp_pass.tracing import ExplainedLayer


def show_report(report: Report, console: Console) -> None:
    """The table of components, memory, recommendation, and last the command to paste."""
    cluster, load, summary = report.cluster, report.load, report.summary
    hardware = cluster.hardware
    console.print(
        f"[bold]{summary.name}[/] ({summary.architecture}, {summary.layers} layers) on "
        f"{hardware.title}\n"
        f"{cluster.data_parallel_size} data-parallel ranks, {cluster.ranks_per_node} per node; "
        f"{load.batch} tokens per rank and step; weights: {load.quantization or summary.dtype}"
    )
    table = _table(
        "component", "sites", "size", "weights", "freed", "sent", "msgs", "TPOT", "pays at"
    )
    for row in report.rows:
        table.add_row(*_cells(row))
    totals = report.totals
    table.add_section()
    table.add_row(
        "total",
        str(sum(row.sites for row in report.rows)),
        "",
        format_bytes(totals["weight_bytes"]),
        format_bytes(totals["bytes_saved_per_rank"]),
        format_bytes(totals["bytes_moved_per_step"]),
        str(totals["messages_per_step"]),
        f"{totals['tpot_change_ms']:+.2f}",
        "",
    )
    console.print(table)
    console.print(
        "freed, sent, msgs: bytes and messages of one rank, the latter two in one step\n"
        "TPOT: change in ms per output token; pays at: tokens per rank",
        style="dim",
    )
    console.print("[bold]Memory of a rank[/]")
    console.print(f"  whole    {_memory(report.whole)}")
    console.print(f"  sharded  {_memory(report.sharded)}")
    parallel = report.tensor_parallel
    stages = parallel.pipeline_parallel_size
    split = f"{parallel.tensor_parallel_size}" + (f", {stages} stages" if stages > 1 else "")
    console.print(f"  without sharding, tensor_parallel_size {split}: {parallel.reason}")
    if report.latent is not None:
        console.print(
            f"  attention: data parallel. Cut by heads, every device would keep all latents: "
            f"{format_bytes(report.latent.tensor_parallel_bytes)} of KV cache in place of "
            f"{format_bytes(report.latent.data_parallel_bytes)}"
        )
    console.print(f"[bold]Recommended for {report.objective}[/]")
    for name, size in report.choice.sizes.items():
        console.print(f"  {name}: {size if size > 1 else 'off'}, {report.choice.reasons[name]}")
    recommended = report.recommended
    for system, names in (("mindie", "MindIE"), ("sglang", "SGLang")):
        if recommended[system]:
            console.print(f"[bold]{names}[/]  {recommended[system]}", soft_wrap=True)
    console.print(report.command, markup=False, highlight=False, soft_wrap=True)


def _cells(row: Row) -> list[str]:
    pays = row.pays_at_tokens_per_rank
    never = "never" if row.group_size > 1 else ""
    until = f"{pays[0]}-{pays[1]}" if pays and pays[1] else "always" if pays else never
    return [
        row.component,
        str(row.sites),
        str(row.group_size) if row.group_size > 1 else "off",
        format_bytes(row.weight_bytes),
        format_bytes(row.bytes_saved_per_rank),
        format_bytes(row.bytes_moved_per_step),
        str(row.messages_per_step),
        f"{row.tpot_change_ms:+.2f}" if row.group_size > 1 else "",
        until,
    ]


def _memory(memory: Memory) -> str:
    return (
        f"{format_bytes(memory.weight_bytes)} weights + {format_bytes(memory.kv_bytes)} KV cache "
        f"of {format_bytes(memory.usable_bytes)} usable: "
        f"{'fits' if memory.fits else 'does not fit'}"
    )


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))  # fits 80 columns
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


def show_hardware(profiles: Sequence[Hardware], console: Console, in_full: bool) -> None:
    """The profiles in a table; in full: every constant with its source."""
    table = _table("profile", "memory", "bandwidth", "16-bit matmul", "link", "per rank")
    for one in profiles:
        rate = one.matmul_rates.get("bfloat16") or next(iter(one.matmul_rates.values()))
        table.add_row(
            one.name,
            f"{one.memory.value / 1e9:.0f} GB",
            f"{one.memory_bandwidth.value / 1e12:.2f} TB/s",
            f"{rate.value / 1e12:.0f} TFLOP/s",
            one.within_node.kind,
            f"{one.within_node.all_gather.bytes_per_second / 1e9:.0f} GB/s",
        )
    console.print(table)
    if not in_full:
        console.print("`fgtp hardware NAME` and --json give every constant with its source.")
        return
    for one in profiles:
        console.print(f"[bold]{one.title}[/]")
        for name, value, source in one.constants():
            console.print(f"  {name} = {value}\n    [dim]{source}[/]", highlight=False)


def show_layer(layer: "ExplainedLayer", console: Console) -> None:
    """A layer's sites, its other parameters with reasons, and its graph before and after."""
    size = layer.plan.data_parallel_size
    console.print(f"[bold]{layer.name}[/] over groups of {size} ranks\n")
    for site in layer.plan.sites:
        console.print(f"[bold]{site.component}[/]  {escape(site.path)}", highlight=False)
        for weight in site.weights:
            shard = list(weight.shard_shape(size))
            console.print(f"  {weight.fqn}  {list(weight.shape)} -> {shard}", markup=False)
    if not layer.plan.sites:
        console.print("no component of this layer is sharded")
    console.print("\n[bold]left alone[/]")
    for alone in layer.plan.left_alone:
        console.print(f"  {alone.fqn}: {alone.reason}", markup=False, highlight=False)
    for title, text in (("before", layer.before), ("after", layer.after)):
        console.print(f"\n[bold]{title}[/]")
        console.print(text, markup=False, highlight=False, soft_wrap=True)

"""Reports as rich tables of at most 80 columns."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fgtp_pass.cost.commands import Command
from fgtp_pass.cost.compare import Option
from fgtp_pass.cost.estimate import Row
from fgtp_pass.cost.hardware import Hardware
from fgtp_pass.cost.report import Report
from fgtp_pass.cost.uncertainty import Predicted
from fgtp_pass.plan.plan import format_bytes

if TYPE_CHECKING:
    from fgtp_pass.models.explain_layer import ExplainedLayer

_GIB, _MIB = 2**30, 2**20


def show_report(report: Report, console: Console, sensitivity: bool = False) -> None:
    """The layouts, the components, the reasons, and last the command to paste."""
    console.print(heading(report), highlight=False, markup=False)
    console.print(_layout_table(report))
    console.print(
        "TPOT with its range; tok/s: output tokens per second and device; GiB: weights\n"
        "of a device; most: sequences that fit",
        style="dim",
    )
    console.print(escape(report.comparison.verdict), highlight=False)
    if sensitivity:
        console.print()
        show_sensitivity(report, console)
    console.print(
        f"\n[bold]Components[/] for data-parallel ranks of one device, "
        f"{report.tokens_per_rank:,} tokens each",
        highlight=False,
    )
    console.print(_component_table(report))
    console.print(
        "GiB: weights, and what is freed of them; sent, msgs: MiB and messages of a step;\n"
        "both of one rank; TPOT: change in ms per output token; pays at: tokens per rank",
        style="dim",
    )
    for line in memory_lines(report):
        console.print(line, highlight=False, markup=False)
    console.print(f"[bold]Sizes for {report.objective}[/]")
    for name, size in report.choice.sizes.items():
        console.print(f"  {name}: {_size(size)}, {report.choice.reasons[name]}", highlight=False)
    on = [name for name, size in report.prefill.sizes.items() if size > 1]
    console.print(
        f"  On instances that only prefill, {report.load.input_tokens:,} tokens per rank: "
        f"{', '.join(on) or 'none of them'}",
        highlight=False,
    )
    for command in report.other_systems:
        _show_command(command, console)
    command = report.command
    for note in command.notes:
        console.print(f"[dim]{escape(note)}[/]", highlight=False)
    console.print(command.text, markup=False, highlight=False, soft_wrap=True)


def heading(report: Report) -> str:
    """What is planned, in two lines."""
    load, summary = report.load, report.summary
    weights = load.scheme.name if load.scheme else summary.dtype
    output = f" + {load.output_tokens:,} tokens out" if load.output_tokens else ""
    text = (
        f"{summary.name} ({summary.architecture}, {summary.layers} layers) on {report.devices} x "
        f"{report.hardware.title}\n{load.sequences:,} sequences of {load.input_tokens:,} tokens in"
        f"{output}; weights: {weights}; KV cache: {load.cache_dtype or summary.dtype}"
    )
    if summary.cache_assumed is not None:
        text += (
            "\nKV cache assumed from the config's heads, in all layers: the model does not run "
            f"without weights ({summary.cache_assumed})"
        )
    return text


def _layout_table(report: Report) -> Table:
    table = _table("layout", "TPOT ms", "tok/s", "prefill", "GiB", "most")
    for option in report.comparison.options:
        table.add_row(*layout_cells(option), style=None if option.fits else "dim")
    return table


def layout_cells(option: Option) -> list[str]:
    return [
        option.name,
        ms_range(option.tpot),
        f"{option.throughput:,.0f}" if option.fits else "no room",
        _duration(option.prefill),
        f"{sum(option.weights.values()) / _GIB:.1f}",
        f"{option.most:,}",
    ]


def ms_range(predicted: Predicted) -> str:
    low, mid, high = (1e3 * one for one in (predicted.low, predicted.mid, predicted.high))
    digits = 0 if mid >= 100 else 1
    return f"{mid:.{digits}f} [{low:.{digits}f}-{high:.{digits}f}]"


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1e3 * seconds:.0f} ms"


def _component_table(report: Report) -> Table:
    table = _table("component", "size", "GiB", "freed", "sent", "msgs", "TPOT ms", "pays at")
    for row in report.rows:
        table.add_row(*component_cells(row))
    totals = report.totals
    table.add_section()
    low, high = totals["tpot_change_range_ms"]
    table.add_row(
        "total",
        "",
        f"{totals['weight_bytes'] / _GIB:.2f}",
        f"{totals['bytes_saved_per_rank'] / _GIB:.2f}",
        f"{totals['bytes_moved_per_step'] / _MIB:.1f}",
        str(totals["messages_per_step"]),
        f"{totals['tpot_change_ms']:+.2f} [{low:+.1f} {high:+.1f}]",
        "",
    )
    return table


def component_cells(row: Row) -> list[str]:
    low, high = row.tpot_change_range_ms
    return [
        row.component,
        _size(row.group_size),
        f"{row.weight_bytes / _GIB:.2f}",
        f"{row.bytes_saved_per_rank / _GIB:.2f}",
        f"{row.bytes_moved_per_step / _MIB:.1f}",
        str(row.messages_per_step),
        f"{row.tpot_change_ms:+.2f} [{low:+.1f} {high:+.1f}]" if row.group_size > 1 else "",
        _pays(row),
    ]


def _size(size: int) -> str:
    return str(size) if size > 1 else "off"


def _pays(row: Row) -> str:
    pays = row.pays_at_tokens_per_rank
    if row.group_size == 1:
        return ""
    if pays is None:
        return "never"
    return f"{pays[0]}-{pays[1]}" if pays[1] else "always"


def memory_lines(report: Report) -> list[str]:
    """What a rank of one device holds, whole and with the sizes in force."""
    memory = report.totals["memory_per_rank"]
    kept, usable = (format_bytes(memory[name]) for name in ("kv_bytes", "usable_bytes"))
    found = ["Memory of a data-parallel rank"]
    for name, weights, fits in (
        ("whole  ", "weight_bytes_whole", "fits_whole"),
        ("sharded", "weight_bytes", "fits"),
    ):
        said = "fits" if memory[fits] else "does not fit"
        found.append(
            f"  {name} {format_bytes(memory[weights])} weights + {kept} KV cache of {usable} "
            f"usable: {said}"
        )
    if report.summary.latent:
        whole = report.deployment.sequence_bytes(report.data_parallel) * report.load.sequences
        found.append(
            "  attention: data parallel. Cut by heads, every device would keep all latents: "
            f"{format_bytes(whole)} of KV cache in place of {kept}"
        )
    return found


def show_sensitivity(report: Report, console: Console) -> None:
    """Which constants move the best layout's TPOT, and each component's change, the most."""
    best = report.comparison.best
    console.print(f"[bold]What decides the range of {best.name}[/]", highlight=False)
    for name, (low, high) in list(best.tpot.by_group.items())[:4]:
        console.print(f"  {name}: {1e3 * low:+.2f} to {1e3 * high:+.2f} ms", highlight=False)
    for row in report.rows:
        if row.group_size == 1:
            continue
        change = report.cluster.change_range(
            report.shapes[row.component], row.group_size, report.tokens_per_rank
        )
        name, (low, high) = next(iter(change.by_group.items()), ("nothing", (0.0, 0.0)))
        sure = "sign certain" if change.certain else "sign not certain"
        console.print(
            f"  {row.component}, {sure}: most by {name} ({1e3 * low:+.2f} to {1e3 * high:+.2f} ms)",
            highlight=False,
        )


def _show_command(command: Command, console: Console) -> None:
    if command.text:
        console.print(f"[bold]{command.system}[/]  {escape(command.text)}", soft_wrap=True)
    for note in command.notes:
        where = "" if command.text else f"{command.system}: "
        console.print(f"[dim]{escape(where + note)}[/]", highlight=False)


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))  # fits 80 columns
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    return table


def show_hardware(profiles: Sequence[Hardware], console: Console, in_full: bool) -> None:
    """The profiles in a table; in full: every constant with its source."""
    table = _table("profile", "memory", "bandwidth", "16-bit matmul", "link", "network")
    for one in profiles:
        rate = one.matmul_rates.get("bfloat16") or next(iter(one.matmul_rates.values()))
        table.add_row(
            one.name,
            f"{one.memory.value / 1e9:.0f} GB",
            f"{one.memory_bandwidth.value / 1e12:.2f} TB/s",
            f"{rate.value / 1e12:.0f} TFLOP/s",
            one.within_node.kind,
            one.across_nodes.kind,
        )
    console.print(table)
    if not in_full:
        console.print("`fgtp hardware NAME` and --json give every constant with its source.")
        return
    for one in profiles:
        console.print(f"[bold]{one.title}[/]")
        for name, value, source in one.constants():
            console.print(f"  {name} = {value}\n    [dim]{escape(source)}[/]", highlight=False)


def show_layer(layer: "ExplainedLayer", console: Console, whole: bool) -> None:
    """A layer's sites, its other parameters with reasons, and what changes in its graph."""
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
    if whole:
        for title, text in (("before", layer.before), ("after", layer.after)):
            console.print(f"\n[bold]{title}[/]")
            console.print(text, markup=False, highlight=False, soft_wrap=True)
        return
    console.print("\n[bold]what changes in its graph[/]")
    styles = {"+": "green", "-": "red", "@": "dim"}
    for line in layer.difference:
        style = styles.get(line[:1])
        console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)

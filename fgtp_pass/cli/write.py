"""Reports as CSV and Markdown."""

import csv
import io

from fgtp_pass.cli.show import component_cells, heading, layout_cells, memory_lines
from fgtp_pass.cost.report import Report

_LAYOUTS = ("layout", "TPOT ms", "tokens/s per device", "prefill", "GiB", "most sequences")
_COMPONENTS = (
    *("component", "size", "GiB", "GiB freed", "MiB sent", "messages", "change of TPOT, ms"),
    "pays at",
)


def as_csv(report: Report) -> str:
    """The layouts, best first, one a line; figures are those of the JSON."""
    layouts = report.to_json()["layouts"]
    simple = [name for name, value in layouts[0].items() if not isinstance(value, (dict, list))]
    names = [*simple[:2], "tpot_ms_low", "tpot_ms", "tpot_ms_high", *simple[2:]]
    names = [name for name in names if name != "freed"]
    written = io.StringIO()
    rows = csv.DictWriter(written, names, extrasaction="ignore", lineterminator="\n")
    rows.writeheader()
    for layout in layouts:
        low, mid, high = layout["tpot_ms"]
        rows.writerow({**layout, "tpot_ms_low": low, "tpot_ms": mid, "tpot_ms_high": high})
    return written.getvalue()


def as_markdown(report: Report) -> str:
    """The tables, the verdict and the command, to paste into a page."""
    layouts = [layout_cells(option) for option in report.comparison.options]
    lines = [
        *heading(report).splitlines(),
        "",
        *_table(_LAYOUTS, layouts),
        "",
        report.comparison.verdict,
        "",
        *_table(_COMPONENTS, [component_cells(row) for row in report.rows]),
        "",
        *(f"- {name}: {reason}" for name, reason in report.choice.reasons.items()),
        "",
        *memory_lines(report),
        "",
        "```",
        report.command.text,
        "```",
        *report.command.notes,
    ]
    return "\n".join(lines) + "\n"


def _table(head: tuple[str, ...], rows: list[list[str]]) -> list[str]:
    return [_row(head), _row(["---"] * len(head)), *map(_row, rows)]


def _row(cells: list[str] | tuple[str, ...]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

"""A static plot of a report with matplotlib (extra `plot`)."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fgtp_pass.cost.report import Report

_LAYOUTS = 10
_TOTAL = "#1b1d21"
_COLORS = ("#7a4fa3", "#0a66b2", "#a85400", "#0b7a5a", "#a1306b", "#5f6b00")
_TOKENS = sorted({round(2 ** (i / 8)) for i in range(81)})  # 1 to 1024


def write_plot(report: Report, path: Path) -> None:
    """Write the layouts' throughput and the change of TPOT as a PNG. Raises OSError."""
    figure = Figure(figsize=(12, 5), dpi=150, layout="constrained")
    layouts, tpot = figure.subplots(1, 2, width_ratios=(1, 1))
    best = report.comparison.best
    said = (
        f"{best.name}, {best.throughput:,.0f} tokens/s per device at {1e3 * best.tpot.mid:.1f} ms"
        if best.fits
        else "no layout fits"
    )
    figure.suptitle(
        f"{report.summary.name} on {report.devices} x {report.hardware.name}, "
        f"{report.load.sequences:,} sequences: {said}"
    )
    _draw_layouts(layouts, report)
    _draw_tpot(tpot, report)
    for axes in (layouts, tpot):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png")


def _draw_layouts(axes: Axes, report: Report) -> None:
    options = report.comparison.options[:_LAYOUTS]
    rates = [option.throughput if option.fits else 0 for option in options]
    axes.barh([option.name for option in options], rates, color=_COLORS[1])
    for place, (option, rate) in enumerate(zip(options, rates, strict=True)):
        low, high = 1e3 * option.tpot.low, 1e3 * option.tpot.high
        text = f"{low:.0f} to {high:.0f} ms" if option.fits else "does not fit"
        axes.annotate(
            text, (rate, place), xytext=(5, 0), textcoords="offset points", va="center", fontsize=8
        )
    axes.set_xlim(0, 1.3 * max(*rates, 1))
    axes.invert_yaxis()
    axes.set_xlabel("output tokens per second and device")


def _draw_tpot(axes: Axes, report: Report) -> None:
    on = [row for row in report.rows if row.group_size > 1]
    curves = {
        row.component: [
            1e3 * report.cluster.change_seconds(report.shapes[row.component], row.group_size, t)
            for t in _TOKENS
        ]
        for row in on
    }
    total = [sum(at) for at in zip(*curves.values(), strict=True)] or [0.0] * len(_TOKENS)
    axes.axhline(0, color=_TOTAL, linewidth=0.8)
    for place, row in enumerate(report.rows):
        if row.group_size > 1:
            label = f"{row.component} ({row.group_size})"
            axes.plot(_TOKENS, curves[row.component], color=_color(place), label=label)
            pays = row.pays_at_tokens_per_rank
            if pays and pays[1] and pays[1] <= _TOKENS[-1]:
                axes.plot(pays[1], 0, "o", color=_color(place), markerfacecolor="white")
    axes.plot(_TOKENS, total, color=_TOTAL, linewidth=2.5, label="total")
    axes.axvline(report.tokens_per_rank, color=_TOTAL, linewidth=0.8, linestyle=":")
    _limit(axes, [total, *curves.values()], report.tokens_per_rank)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set_xlabel("tokens per rank and step (circles: the last at which it pays)")
    axes.set_ylabel("change of TPOT, ms")
    axes.legend(frameon=False)


def _limit(axes: Axes, curves: Sequence[Sequence[float]], batch: int) -> None:
    """Show all that is gained and as much of the losses; the batch's always."""
    gains = -min(0.0, *(min(curve) for curve in curves))
    place = min(range(len(_TOKENS)), key=lambda i: abs(_TOKENS[i] - batch))
    high = max(gains, *(1.2 * curve[place] for curve in curves))
    if gains or high:
        axes.set_ylim(-1.05 * gains - 0.02 * high, high)


def _color(place: int) -> str:
    return _COLORS[place % len(_COLORS)]

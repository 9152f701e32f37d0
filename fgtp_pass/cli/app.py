"""The commands and their options."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from fgtp_pass.cost.report import Report
    from fgtp_pass.summary import ModelSummary

_NOISY = 0.5  # spread of a measurement above which it is worth repeating

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Plan fine-grained tensor parallelism: what it saves and costs, before renting a device.",
)

Model = Annotated[
    str, typer.Argument(help="A Hugging Face name, a checkpoint folder or a config.json.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]


@contextmanager
def _status() -> Iterator[Callable[[str], None]]:
    """A spinner on stderr, and how to say what is being done."""
    with Console(stderr=True).status("reading the config") as spinner:
        yield lambda text: spinner.update(text)


def _summarize(model: str) -> "ModelSummary":
    from fgtp_pass.models import summarize

    with _status() as say:
        return summarize(model, say)


@app.command()
def plan(
    model: Model,
    hardware: Annotated[
        str, typer.Option(help="A profile (see `fgtp hardware`), or a .toml of `fgtp calibrate`.")
    ],
    data_parallel_size: Annotated[int, typer.Option(min=1, help="Data-parallel ranks.")] = 8,
    ranks_per_node: Annotated[
        int, typer.Option(min=1, help="Ranks of one node; chosen groups stay within it.")
    ] = 8,
    batch: Annotated[int, typer.Option(min=1, help="Tokens per rank in a decode step.")] = 8,
    context: Annotated[int, typer.Option(min=1, help="Tokens in the KV cache of each.")] = 4096,
    quantization: Annotated[
        str | None, typer.Option(help="w8a8, fp8, w8a16, w4a16 or none. [default: the config's]")
    ] = None,
    sizes: Annotated[
        str | None,
        typer.Option(help="8; oproj=8,mlp=4; or JSON. Keys of vLLM, MindIE and SGLang work."),
    ] = None,
    auto: Annotated[bool, typer.Option("--auto", help="Choose sizes; so without --sizes.")] = False,
    objective: Annotated[
        str, typer.Option(help="What to choose sizes for: latency, memory or balanced.")
    ] = "balanced",
    html: Annotated[Path | None, typer.Option(help="Write a page to look at, one file.")] = None,
    png: Annotated[Path | None, typer.Option(help="Write a static plot.")] = None,
    as_json: AsJson = False,
) -> None:
    """What each component saves and costs, what fits in memory, and the sizes to take."""
    from fgtp_pass.cli.show import show_report
    from fgtp_pass.cost.advice import read_objective
    from fgtp_pass.cost.hardware import load
    from fgtp_pass.cost.memory import Load
    from fgtp_pass.cost.report import make_report
    from fgtp_pass.cost.spelling import read_sizes
    from fgtp_pass.models import needs_extra
    from fgtp_pass.sizes import config_error

    if auto and sizes is not None:
        raise config_error("--auto and --sizes: give one of them")
    if png is not None and find_spec("matplotlib") is None:
        raise needs_extra("plot", "plots")
    device = load(hardware)
    summary = _summarize(model)
    scheme = summary.quantization if quantization is None else quantization
    report = make_report(
        summary,
        device,
        Load(batch, context, None if scheme == "none" else scheme),
        data_parallel_size=data_parallel_size,
        ranks_per_node=ranks_per_node,
        objective=read_objective(objective),
        asked=None if sizes is None else read_sizes(sizes, summary.keys),
    )
    if html is not None:
        from fgtp_pass.page.render import write_page

        _write(write_page, report, html)
    if png is not None:
        from fgtp_pass.page.plot import write_plot

        _write(write_plot, report, png)
    if as_json:
        typer.echo(json.dumps(report.to_json(), indent=2))
    else:
        show_report(report, Console())


def _write(write: Callable[["Report", Path], None], report: "Report", path: Path) -> None:
    """Write a file; says so on stderr, since the command to paste comes last on stdout."""
    try:
        write(report, path)
    except OSError as error:
        from fgtp_pass.sizes import config_error

        raise config_error(f"{path} cannot be written: {error.strerror}") from None
    typer.echo(f"written to {path}", err=True)


@app.command()
def explain(
    model: Model,
    layer: Annotated[int, typer.Option(min=0, help="The decoder layer to show.")] = 0,
    size: Annotated[int, typer.Option(min=2, help="Ranks of a group.")] = 2,
) -> None:
    """One layer's graph before and after, and why its other parameters are left alone."""
    from fgtp_pass.cli.show import show_layer
    from fgtp_pass.models import read_config
    from fgtp_pass.tracing import explain_layer

    config = read_config(model)
    with _status() as say:
        explained = explain_layer(config, layer, size, say)
    show_layer(explained, Console())


@app.command()
def hardware(
    name: Annotated[str | None, typer.Argument(help="One profile, or a .toml.")] = None,
    as_json: AsJson = False,
) -> None:
    """The hardware profiles, each constant with its source."""
    from fgtp_pass.cli.show import show_hardware
    from fgtp_pass.cost.hardware import load, profiles

    shown = [load(one) for one in ([name] if name else profiles())]
    if as_json:
        typer.echo(json.dumps([one.model_dump() for one in shown], indent=2))
    else:
        show_hardware(shown, Console(), in_full=name is not None)


@app.command()
def calibrate(
    output: Annotated[Path, typer.Option(help="Where to write the profile, a .toml.")],
    world: Annotated[int, typer.Option(min=2, help="Ranks to measure with.")] = 2,
    dtypes: Annotated[
        str, typer.Option(help="What to measure matmuls of; all else uses the first.")
    ] = "float32,bfloat16",
) -> None:
    """Measure this machine: memory bandwidth, matmul rate and each collective, in real ranks."""
    try:
        import tomli_w
    except ImportError:
        from fgtp_pass.models import needs_extra

        raise needs_extra("cli", "TOML files") from None
    from fgtp_pass.cli.show import show_hardware
    from fgtp_pass.cost.calibration_ranks import calibrate as run

    with _status() as say:
        say(f"measuring with {world} ranks; leave the machine alone meanwhile")
        profile = run(world, dtypes.split(","))
    output.write_text(tomli_w.dumps(profile.model_dump(exclude_none=True)))
    show_hardware([profile], Console(), in_full=True)
    assert profile.calibration is not None
    spread = profile.calibration.spread
    worst = max(spread, key=lambda name: spread[name])
    typer.echo(
        f"written to {output}; largest spread (p90 - p10) / median: {worst}, {spread[worst]:.0%}"
    )
    if spread[worst] > _NOISY:
        typer.echo(
            "The times vary a lot: other processes use this machine. Measure again when idle."
        )

"""The commands and their options."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from fgtp_pass.cost.model_summary import ModelSummary
    from fgtp_pass.cost.report import Report

_NOISY = 0.5  # spread of a measurement above which it is worth repeating
_FORMATS = ("text", "markdown", "csv")

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Plan how to serve a model: which layout wins, and which fine-grained sizes to take, "
    "before renting a device.",
)


def _models(started: str) -> list[str]:
    """Names of models for the shell to complete."""
    from fgtp_pass.models.config_json import shipped

    return [name for name in shipped() if name.startswith(started)]


def _profiles(started: str) -> list[str]:
    """Names of profiles for the shell to complete."""
    folder = Path(__file__).parents[1] / "cost" / "profiles"
    return sorted(path.stem for path in folder.glob(f"{started}*.toml"))


_MODEL_HELP = "A Hugging Face name, a checkpoint folder or a config.json."
Model = Annotated[str, typer.Argument(help=_MODEL_HELP, autocompletion=_models)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"fgtp-pass {version('fgtp-pass')}")
        raise typer.Exit


@app.callback()
def _main(
    show_version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    pass


@contextmanager
def _status() -> Iterator[Callable[[str], None]]:
    """A spinner on stderr, and how to say what is being done."""
    with Console(stderr=True).status("reading the config") as spinner:
        yield lambda text: spinner.update(text)


def _summarize(model: str) -> "ModelSummary":
    from fgtp_pass.models.summarize import summarize

    with _status() as say:
        return summarize(model, say)


@app.command()
def plan(
    model: Annotated[str | None, typer.Argument(help=_MODEL_HELP, autocompletion=_models)] = None,
    hardware: Annotated[
        str,
        typer.Option(
            help="A profile (see `fgtp hardware`), or a .toml of `fgtp calibrate`.",
            autocompletion=_profiles,
        ),
    ] = "",
    devices: Annotated[
        int | None,
        typer.Option("--devices", "--data-parallel-size", min=1, help="Devices. [default: 8]"),
    ] = None,
    devices_per_node: Annotated[
        int | None,
        typer.Option(
            "--devices-per-node",
            "--ranks-per-node",
            min=1,
            help="Devices of one node; chosen groups stay within it. [default: the profile's]",
        ),
    ] = None,
    network: Annotated[
        str | None,
        typer.Option(
            help="Between nodes: infiniband, roce, ethernet or nvlink. [default: profile]"
        ),
    ] = None,
    network_gbps: Annotated[
        float | None, typer.Option(min=0.1, help="Gbit/s of it per device. [default: profile]")
    ] = None,
    sequences: Annotated[
        int | None, typer.Option(min=1, help="Sequences in flight on all devices together.")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="The same per device. [default: 8]")
    ] = None,
    tpot: Annotated[
        float | None,
        typer.Option(
            min=0.1, help="A target in ms per output token: compare throughput within it."
        ),
    ] = None,
    input_tokens: Annotated[
        int | None,
        typer.Option("--input", "--context", min=1, help="Tokens of a prompt. [default: 4096]"),
    ] = None,
    output_tokens: Annotated[
        int, typer.Option("--output", min=0, help="Tokens that follow it.")
    ] = 0,
    quantization: Annotated[
        str | None,
        typer.Option(help="w8a8, fp8, w8a16, w4a16, mxfp4, nvfp4, none. [default: the config's]"),
    ] = None,
    kv_dtype: Annotated[
        str | None, typer.Option(help="Of the KV cache: bfloat16, fp8. [default: the model's]")
    ] = None,
    mtp: Annotated[
        bool, typer.Option("--mtp", help="Load the layers for multi-token prediction too.")
    ] = False,
    sizes: Annotated[
        str | None,
        typer.Option(help="8; oproj=8,mlp=4; or JSON. Keys of vLLM, MindIE and SGLang work."),
    ] = None,
    auto: Annotated[bool, typer.Option("--auto", help="Choose sizes; so without --sizes.")] = False,
    objective: Annotated[
        str, typer.Option(help="What to choose sizes for: latency, memory or balanced.")
    ] = "balanced",
    from_command: Annotated[
        str | None, typer.Option("--from", help="Plan what a `vllm serve ...` command asks for.")
    ] = None,
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity", help="Show which constants decide.")
    ] = False,
    html: Annotated[Path | None, typer.Option(help="Write a page to look at, one file.")] = None,
    png: Annotated[Path | None, typer.Option(help="Write a static plot.")] = None,
    form: Annotated[
        str, typer.Option("--format", help="text, markdown, or csv (the layouts).")
    ] = "text",
    as_json: AsJson = False,
) -> None:
    """Compare the layouts of a model at equal load, and what each component saves and costs."""
    from fgtp_pass.cli.ask import Asked, report_of
    from fgtp_pass.cli.show import show_report
    from fgtp_pass.hints import config_error, needs_extra, unknown

    if auto and sizes is not None:
        raise config_error("--auto and --sizes: give one of them")
    if form not in _FORMATS:
        raise config_error(unknown("format", form, _FORMATS, "--format"))
    if png is not None and find_spec("matplotlib") is None:
        raise needs_extra("plot", "plots")
    asked = Asked(
        model=model,
        hardware=hardware,
        devices=devices,
        devices_per_node=devices_per_node,
        network=network,
        network_gbps=network_gbps,
        sequences=sequences,
        batch=batch,
        tpot_ms=tpot,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        quantization=quantization,
        kv_dtype=kv_dtype,
        mtp=mtp,
        sizes=sizes,
        objective=objective,
        command=from_command,
    )
    report = report_of(asked, _summarize, lambda text: typer.echo(text, err=True))
    if html is not None:
        from fgtp_pass.page.render import write_page

        _write(write_page, report, html)
    if png is not None:
        from fgtp_pass.page.plot import write_plot

        _write(write_plot, report, png)
    if as_json:
        typer.echo(json.dumps(report.to_json(), indent=2))
    elif form == "text":
        show_report(report, Console(), sensitivity)
    else:
        from fgtp_pass.cli.write import as_csv, as_markdown

        typer.echo(as_csv(report) if form == "csv" else as_markdown(report), nl=False)


def _write(write: Callable[["Report", Path], None], report: "Report", path: Path) -> None:
    """Write a file; says so on stderr, since the command to paste comes last on stdout."""
    try:
        write(report, path)
    except OSError as error:
        from fgtp_pass.hints import config_error

        raise config_error(f"{path} cannot be written: {error.strerror}") from None
    typer.echo(f"written to {path}", err=True)


@app.command()
def explain(
    model: Model,
    layer: Annotated[int, typer.Option(min=0, help="The decoder layer to show.")] = 0,
    size: Annotated[int, typer.Option(min=2, help="Ranks of a group.")] = 2,
    whole: Annotated[
        bool, typer.Option("--whole", help="The whole graphs, not what changes in them.")
    ] = False,
) -> None:
    """What changes in one layer's graph, and why its other parameters are left alone."""
    from fgtp_pass.cli.show import show_layer
    from fgtp_pass.models.config_json import read_config
    from fgtp_pass.models.explain_layer import explain_layer

    config = read_config(model)
    with _status() as say:
        explained = explain_layer(config, layer, size, say)
    show_layer(explained, Console(), whole)


@app.command()
def hardware(
    name: Annotated[
        str | None, typer.Argument(help="One profile, or a .toml.", autocompletion=_profiles)
    ] = None,
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
        from fgtp_pass.hints import needs_extra

        raise needs_extra("cli", "TOML files") from None
    from fgtp_pass.calibration.ranks import calibrate as run
    from fgtp_pass.cli.show import show_hardware

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

"""What a user asks `fgtp plan`, and the report of it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fgtp_pass.cost.advice import read_objective
from fgtp_pass.cost.command_line import ServeCommand, read_command
from fgtp_pass.cost.hardware import load
from fgtp_pass.cost.layout import Deployment, Load
from fgtp_pass.cost.quantization import cache_element_bytes, scheme_of
from fgtp_pass.cost.report import Report, make_report
from fgtp_pass.cost.spelling import read_sizes
from fgtp_pass.hints import config_error
from fgtp_pass.plan.sizes import ComponentSizes, parse_sizes

if TYPE_CHECKING:
    from fgtp_pass.cost.model_summary import ModelSummary
    from fgtp_pass.cost.quantization import Scheme

_DEVICES, _BATCH, _INPUT = 8, 8, 4096


@dataclass(frozen=True)
class Asked:
    """The options of `fgtp plan`; None for what was not given. command: of --from."""

    model: str | None
    hardware: str
    devices: int | None
    devices_per_node: int | None
    network: str | None
    network_gbps: float | None
    sequences: int | None
    batch: int | None
    tpot_ms: float | None
    input_tokens: int | None
    output_tokens: int
    quantization: str | None
    kv_dtype: str | None
    mtp: bool
    sizes: str | None
    objective: str
    command: str | None


def report_of(
    asked: Asked, summarize: Callable[[str], "ModelSummary"], say: Callable[[str], None]
) -> Report:
    """The report of what was asked. Raises ConfigError for what cannot be planned.

    Options win over a command of --from. say: is told what of it has no part in the plan.
    """
    given = _command(asked, say)
    model = asked.model or (None if given is None else given.model)
    if model is None:
        raise config_error("give a MODEL to plan, or a command with --from")
    if not asked.hardware:
        raise config_error("give --hardware: a profile of `fgtp hardware`, or a .toml")
    if asked.sequences is not None and asked.batch is not None:
        raise config_error("--sequences and --batch: give one of them")
    hardware = load(asked.hardware).with_network(asked.network, asked.network_gbps)
    objective = read_objective(asked.objective)
    summary = summarize(model)
    devices = asked.devices or (given.devices if given else _DEVICES)
    deployment = Deployment(
        summary=summary,
        hardware=hardware,
        load=_load(asked, given, summary, devices),
        devices_per_node=_per_node(asked, given, hardware.devices_per_node),
    )
    return make_report(
        deployment,
        devices,
        objective=objective,
        target=None if asked.tpot_ms is None else asked.tpot_ms / 1e3,
        asked=_sizes(asked, given, summary),
    )


def _command(asked: Asked, say: Callable[[str], None]) -> ServeCommand | None:
    if asked.command is None:
        return None
    given = read_command(asked.command)
    if given.ignored:
        say(f"not part of the plan: {', '.join(given.ignored)}")
    return given


def _load(asked: Asked, given: ServeCommand | None, summary: "ModelSummary", devices: int) -> Load:
    cache_dtype = asked.kv_dtype or (given.cache_dtype if given else None) or summary.cache_dtype
    cache_dtype = None if cache_dtype == "auto" else cache_dtype
    cache_element_bytes(summary.dtype, cache_dtype)  # an unknown dtype is refused at once
    sequences = asked.sequences or (asked.batch or _BATCH) * devices
    if asked.sequences is None and asked.batch is None and given and given.sequences_per_rank:
        sequences = given.sequences_per_rank * given.data_parallel_size
    return Load(
        sequences=sequences,
        input_tokens=asked.input_tokens or (given.context if given else None) or _INPUT,
        output_tokens=asked.output_tokens,
        scheme=_scheme(asked.quantization or (given.scheme if given else None), summary),
        cache_dtype=cache_dtype,
        draft=asked.mtp,
    )


def _scheme(name: str | None, summary: "ModelSummary") -> "Scheme | None":
    if name is None:
        if summary.scheme is not None and not summary.scheme.rules:
            raise config_error(
                f"the checkpoint is quantised with {summary.scheme.name!r}, which the cost model "
                "does not know. Say with --quantization what comes nearest, or none."
            )
        return summary.scheme
    return None if name == "none" else scheme_of(name)


def _per_node(asked: Asked, given: ServeCommand | None, of_profile: int) -> int:
    if asked.devices_per_node is not None:
        return asked.devices_per_node
    if given is not None and given.ranks_per_node is not None:
        return given.ranks_per_node * given.tensor_parallel_size
    return of_profile


def _sizes(
    asked: Asked, given: ServeCommand | None, summary: "ModelSummary"
) -> ComponentSizes | None:
    if asked.sizes is not None:
        return read_sizes(asked.sizes, summary.keys)
    if given is not None and given.sizes is not None:
        return parse_sizes(given.sizes, summary.keys)
    return None

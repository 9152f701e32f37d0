"""What the user may ask for: the options of the backend, checked before anything else happens."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from fgtp_pass.cost.advice import Objective
from fgtp_pass.cost.hardware import load
from fgtp_pass.detect.match import Pattern
from fgtp_pass.errors import ConfigError
from fgtp_pass.hints import unknown
from fgtp_pass.patterns import BUILTIN, with_own
from fgtp_pass.plan.sizes import COMPONENT_SIZES, ComponentSizes, parse_sizes

MEASURE = "measure"


class Options(BaseModel):
    """The `options=` of `torch.compile(model, backend=fgtp_backend, options={...})`.

    finegrained_tp_config: sizes by component, see `fgtp_pass.plan.sizes`. tokens: "equal" promises
    that the ranks of a group call with the same number of tokens; "ragged" pads to the largest.
    check_tokens: compare the token counts before every step (equal only; ragged always does).
    check_weights: compare a checksum of every weight that is to be cut before it is.
    inner_backend: compiles the rewritten graph; a Dynamo backend's name or a callable.
    inner_options: its `options=`. process_group: the data-parallel group, a ProcessGroup or a
    one-dimensional DeviceMesh; None for the world. allow_missing: components that may have no
    site. timeout_seconds: how long a rank waits for its group. patterns: more components.

    decode_batch: tokens per rank of a decode step. objective: "latency", "balanced" (the default
    with a decode_batch) or "memory". With either of these, "auto" is what the cost model favours.
    hardware: its constants, a profile's name or a path; by default those of the detected device, or
    of a calibration of this machine that is measured once and kept; "measure" measures again.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    finegrained_tp_config: Any = None
    tokens: Literal["equal", "ragged"] = "equal"
    check_tokens: bool = Field(default=True, strict=True)
    check_weights: bool = Field(default=True, strict=True)
    inner_backend: str | Callable[..., Any] = "inductor"
    inner_options: dict[str, Any] | None = None
    process_group: Any = None
    allow_missing: tuple[str, ...] = ()
    timeout_seconds: float = Field(default=600.0, gt=0)
    patterns: tuple[Pattern, ...] = ()
    decode_batch: int | None = Field(default=None, ge=1, strict=True)
    objective: Objective | None = None
    hardware: str | None = None

    @field_validator("allow_missing", "patterns", mode="before")
    @classmethod
    def _as_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, (list, set, frozenset)) else value

    @property
    def all_patterns(self) -> tuple[Pattern, ...]:
        return with_own(self.patterns)

    @property
    def sizes(self) -> ComponentSizes:
        return parse_sizes(self.finegrained_tp_config, self.all_patterns)


def parse_options(options: Mapping[str, Any] | None) -> Options:
    """Check the backend's options. Raises ConfigError with one sentence per mistake."""
    given = dict(options or {})
    size_keys = {key for p in BUILTIN for key in (p.config_key, *p.aliases)}
    flat = sorted(size_keys & given.keys())
    if flat:
        raise ConfigError(
            f"{', '.join(flat)} stands directly in options; component sizes belong one level "
            f"down: options={{{COMPONENT_SIZES!r}: {{{flat[0]!r}: {given[flat[0]]!r}}}}}."
        )
    for key in given:
        if key not in Options.model_fields:
            raise ConfigError(unknown("option", key, list(Options.model_fields), "options"))
    try:
        parsed = Options(**given)
    except ValidationError as error:
        raise ConfigError(
            "; ".join(
                f"option {'.'.join(map(str, e['loc'][:1]))!r}: {e['msg']}, not {e['input']!r}"
                for e in error.errors()
            )
        ) from None
    known = [pattern.component for pattern in parsed.all_patterns]
    for name in parsed.allow_missing:
        if name not in known:
            raise ConfigError(unknown("component", name, known, "allow_missing"))
    _ = parsed.sizes  # raises for a wrong finegrained_tp_config
    if parsed.objective in ("latency", "balanced") and parsed.decode_batch is None:
        raise ConfigError(
            f"objective {parsed.objective!r} needs decode_batch: the tokens per rank of a decode "
            "step, for which costs are compared."
        )
    if parsed.hardware not in (None, MEASURE):
        load(parsed.hardware)  # raises for an unknown one
    return parsed

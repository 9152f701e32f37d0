"""What the user may ask for: the options of the backend, checked before anything else happens."""

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from fgtp_pass.errors import ConfigError
from fgtp_pass.pattern import Pattern
from fgtp_pass.patterns import BUILTIN

AUTO: Final = "auto"
COMPONENT_SIZES = "finegrained_tp_config"
_OFF = (-1, 0, 1, None)


@dataclass(frozen=True)
class ComponentSizes:
    """The group size that the user asked for, by component: a size > 1, 1 for off, or "auto"."""

    by_component: Mapping[str, int | Literal["auto"]]

    def resolve(self, data_parallel_size: int, ranks_on_host: int) -> dict[str, int]:
        """The sizes for a data-parallel group; 1 means off.

        "auto" is the largest divisor of the group's size that is <= the ranks on one host, so
        that no collective leaves it. Raises ConfigError for a size that does not divide.
        """
        auto = max(k for k in range(1, ranks_on_host + 1) if data_parallel_size % k == 0)
        sizes = {}
        for component, size in self.by_component.items():
            sizes[component] = auto if size == AUTO else int(size)
            if data_parallel_size % sizes[component]:
                raise ConfigError(
                    f"{component}: a group of {size} ranks does not divide the data-parallel size "
                    f"{data_parallel_size}. Choose one of {_divisors(data_parallel_size)}."
                )
        return sizes

    @property
    def requested(self) -> dict[str, int]:
        """The components that were asked for by number; finding no site of one is an error."""
        return {c: s for c, s in self.by_component.items() if isinstance(s, int) and s > 1}


def _divisors(n: int) -> list[int]:
    return [k for k in range(1, n + 1) if n % k == 0]


def parse_sizes(
    config: Mapping[str, Any] | None, patterns: Sequence[Pattern] = BUILTIN
) -> ComponentSizes:
    """Check a `finegrained_tp_config`. None asks for "auto" everywhere; a key left out is off.

    Sizes: an integer > 1; -1, 0, 1 or None for off; or "auto". Raises ConfigError for anything
    else, naming the nearest known key for an unknown one.
    """
    if config is None:
        return ComponentSizes({pattern.component: AUTO for pattern in patterns})
    if not isinstance(config, Mapping):
        raise ConfigError(
            f"{COMPONENT_SIZES} must be a mapping from component keys to sizes, "
            f"not {type(config).__name__}."
        )
    keys = {key: p for p in patterns for key in (p.config_key, *p.aliases)}
    given: dict[str, tuple[str, int | Literal["auto"]]] = {}
    for key, value in config.items():
        if key not in keys:
            raise ConfigError(_unknown("key", key, keys, COMPONENT_SIZES))
        component, size = keys[key].component, _parse_size(key, value)
        if component in given and given[component][1] != size:
            raise ConfigError(
                f"{given[component][0]} and {key} are two names of one setting, but their values "
                f"differ: {given[component][1]} and {size}. Keep one of them."
            )
        given[component] = (key, size)
    return ComponentSizes(
        {p.component: given[p.component][1] if p.component in given else 1 for p in patterns}
    )


def _parse_size(key: str, value: Any) -> int | Literal["auto"]:
    if value == AUTO:
        return AUTO
    if isinstance(value, bool) or not (value is None or isinstance(value, int)):
        raise ConfigError(
            f'{key} must be a number of ranks or "auto", not {value!r} ({type(value).__name__}).'
        )
    if value in _OFF:
        return 1
    if value < 0:
        raise ConfigError(f"{key} is {value}; a size is > 1, or -1, 0, 1 or None for off.")
    return int(value)


def nearest_hint(given: object, known: Iterable[str]) -> str:
    """What may have been meant by a name that is not known, as a sentence to append."""
    names = list(known)
    nearest = difflib.get_close_matches(str(given), names, n=1, cutoff=0.4)
    return f" Did you mean {nearest[0]!r}?" if nearest else f" Known: {', '.join(names)}."


def _unknown(what: str, given: str, known: Iterable[str], where: str) -> str:
    return f"unknown {what} {given!r} in {where}.{nearest_hint(given, known)}"


class Options(BaseModel):
    """The `options=` of `torch.compile(model, backend=fgtp_backend, options={...})`.

    finegrained_tp_config: sizes by component, see `parse_sizes`. tokens: "equal" promises that
    the ranks of a group call with the same number of tokens; "ragged" pads to the largest.
    check_tokens: compare the token counts before every step (equal only; ragged always does).
    inner_backend: compiles the rewritten graph; a Dynamo backend's name or a callable.
    inner_options: its `options=`. process_group: the data-parallel group, a ProcessGroup or a
    one-dimensional DeviceMesh; None for the world. allow_missing: components that may have no
    site. timeout_seconds: how long a rank waits for its group. patterns: more components.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    finegrained_tp_config: Any = None
    tokens: Literal["equal", "ragged"] = "equal"
    check_tokens: bool = Field(default=True, strict=True)
    inner_backend: str | Callable[..., Any] = "inductor"
    inner_options: dict[str, Any] | None = None
    process_group: Any = None
    allow_missing: tuple[str, ...] = ()
    timeout_seconds: float = Field(default=600.0, gt=0)
    patterns: tuple[Pattern, ...] = ()

    @field_validator("allow_missing", "patterns", mode="before")
    @classmethod
    def _as_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, (list, set, frozenset)) else value

    @property
    def all_patterns(self) -> tuple[Pattern, ...]:
        return BUILTIN + self.patterns

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
            raise ConfigError(_unknown("option", key, list(Options.model_fields), "options"))
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
            raise ConfigError(_unknown("component", name, known, "allow_missing"))
    _ = parsed.sizes  # raises for a wrong finegrained_tp_config
    return parsed

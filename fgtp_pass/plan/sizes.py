"""Group sizes as users write them, by component. Imports no torch: the command line starts fast."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol

from fgtp_pass.hints import config_error, unknown

AUTO: Final = "auto"


COMPONENT_SIZES = "finegrained_tp_config"


_OFF = (-1, 0, 1, None)


class Component(Protocol):
    """What sizes need to know of a component; a `Pattern` is one."""

    @property
    def component(self) -> str: ...
    @property
    def config_key(self) -> str: ...
    @property
    def aliases(self) -> tuple[str, ...]: ...
    @property
    def opt_in(self) -> bool: ...


@dataclass(frozen=True)
class ComponentSizes:
    """The group size that the user asked for, by component: a size > 1, 1 for off, or "auto".

    not_asked: those of "auto" that only the cost model may turn on.
    """

    by_component: Mapping[str, int | Literal["auto"]]
    not_asked: frozenset[str] = frozenset()

    def resolve(
        self,
        data_parallel_size: int,
        ranks_on_host: int,
        auto: Mapping[str, int] | None = None,
    ) -> dict[str, int]:
        """The sizes for a data-parallel group; 1 means off.

        auto: what "auto" stands for by the cost model, by component; without it the largest divisor
        of the group's size that is <= the ranks on one host, so that no collective leaves it.
        Raises ConfigError for a size that does not divide the group.
        """
        largest = max(k for k in divisors(data_parallel_size) if k <= ranks_on_host)
        sizes = {}
        for component, size in self.by_component.items():
            default = 1 if component in self.not_asked else largest
            chosen = default if auto is None else auto.get(component, 1)
            sizes[component] = chosen if size == AUTO else int(size)
            if data_parallel_size % sizes[component]:
                raise config_error(
                    f"{component}: a group of {size} ranks does not divide the data-parallel size "
                    f"{data_parallel_size}. Choose one of {divisors(data_parallel_size)}."
                )
        return sizes

    @property
    def requested(self) -> dict[str, int]:
        """The components that were asked for by number; finding no site of one is an error."""
        return {c: s for c, s in self.by_component.items() if isinstance(s, int) and s > 1}


def divisors(n: int) -> list[int]:
    return [k for k in range(1, n + 1) if n % k == 0]


def parse_sizes(
    config: Mapping[str, Any] | None, components: Sequence[Component]
) -> ComponentSizes:
    """Check a `finegrained_tp_config`. None asks for "auto" everywhere; a key left out is off.

    Components that are opt-in are "auto" then for the cost model only.

    Sizes: an integer > 1; -1, 0, 1 or None for off; or "auto". Raises ConfigError for anything
    else, naming the nearest known key for an unknown one.
    """
    if config is None:
        return ComponentSizes(
            {known.component: AUTO for known in components},
            frozenset(known.component for known in components if known.opt_in),
        )
    if not isinstance(config, Mapping):
        raise config_error(
            f"{COMPONENT_SIZES} must be a mapping from component keys to sizes, "
            f"not {type(config).__name__}."
        )
    keys = {key: known for known in components for key in (known.config_key, *known.aliases)}
    given: dict[str, tuple[str, int | Literal["auto"]]] = {}
    for key, value in config.items():
        if key not in keys:
            raise config_error(unknown("key", key, keys, COMPONENT_SIZES))
        component, size = keys[key].component, _parse_size(key, value)
        if component in given and given[component][1] != size:
            raise config_error(
                f"{given[component][0]} and {key} are two names of one setting, but their values "
                f"differ: {given[component][1]} and {size}. Keep one of them."
            )
        given[component] = (key, size)
    return ComponentSizes(
        {c.component: given[c.component][1] if c.component in given else 1 for c in components}
    )


def _parse_size(key: str, value: Any) -> int | Literal["auto"]:
    if value == AUTO:
        return AUTO
    if isinstance(value, bool) or not (value is None or isinstance(value, int)):
        raise config_error(
            f'{key} must be a number of ranks or "auto", not {value!r} ({type(value).__name__}).'
        )
    if value in _OFF:
        return 1
    if value < 0:
        raise config_error(f"{key} is {value}; a size is > 1, or -1, 0, 1 or None for off.")
    return int(value)

"""Hardware profiles: the constants of the formulas, each with its source and its spread."""

import re
import tomllib
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from statistics import median
from typing import Any

from pydantic import Field, ValidationError, model_validator
from sympy import Symbol

from fgtp_pass.algebra.placement import Collective
from fgtp_pass.cost import formulas, layout_formulas
from fgtp_pass.cost.links import CollectiveTime, Frozen, Link
from fgtp_pass.hints import config_error, unknown

__all__ = ["Calibration", "CollectiveTime", "Constant", "Hardware", "Link", "Overlap"]

# how far off what is measured may be, where no calibration says
_MEASURED = 0.1


class Constant(Frozen):
    """A number with its source. spread: how far off it may be, 0.5 for from 1/1.5 of it to 1.5 of
    it; None where only a calibration can say.
    """

    value: float = Field(gt=0)
    spread: float | None = Field(default=None, ge=0)
    source: str


class Overlap(Frozen):
    """The share of the shorter of reading and computing that the longer hides, with its source."""

    value: float = Field(ge=0, le=1)
    source: str


class Calibration(Frozen):
    """When and where constants were measured, and how much their times varied.

    machine: its device, in general words. world: group sizes that were measured. spread: per
    measurement, (p90 - p10) / median of its times.
    """

    measured_at: str
    machine: str
    torch: str
    world: tuple[int, ...]
    spread: dict[str, float]

    def typical_spread(self, *kinds: str) -> float:
        """Half of the median spread of the measurements of these kinds, as a constant's spread."""
        mine = [s for name, s in self.spread.items() if any(kind in name for kind in kinds)]
        return median(mine) / 2 if mine else _MEASURED


class Hardware(Frozen):
    """One kind of device and its links.

    device_names: parts of the name that the device gives itself, to detect it by. memory: bytes.
    memory_bandwidth: bytes/s of the data sheet; memory_efficiency: the part of it that a matmul
    with few rows reaches once it runs. matmul_rates: FLOP/s by dtype (dense); matmul_efficiency:
    likewise. overlap: see `fgtp_pass.cost.formulas.roofline`. matmul_seconds: what a matmul takes
    besides; layer_seconds: what a layer takes beside its matmuls, attention and collectives;
    expert_imbalance: tokens of the busiest of the devices that share experts, over the mean.
    devices_per_node: those that `within_node` joins.
    """

    name: str
    title: str
    family: str | None = None
    device_names: tuple[str, ...] = ()
    devices_per_node: int = Field(default=8, ge=1)
    memory: Constant
    memory_bandwidth: Constant
    memory_efficiency: Constant
    matmul_rates: dict[str, Constant]
    matmul_efficiency: Constant
    overlap: Overlap
    matmul_seconds: Constant | None = None
    layer_seconds: Constant | None = None
    expert_imbalance: Constant | None = None
    within_node: Link
    across_nodes: Link
    calibration: Calibration | None = None

    @model_validator(mode="before")
    @classmethod
    def _of_family(cls, given: Any) -> Any:
        """With the constants that all devices of the family have in common."""
        if not isinstance(given, Mapping) or given.get("family") is None:
            return given
        if given["family"] not in families():
            raise ValueError(f"no family {given['family']!r}; there are {', '.join(families())}")
        return {**families()[given["family"]], **given}

    def matmul_rate(self, dtype: str) -> float:
        """FLOP/s reached with weights and inputs of `dtype`.

        A dtype that the device has no rate for is computed at its 16-bit rate, as weight-only
        kernels do. Raises ConfigError where there is no such rate either.
        """
        for name in (dtype, "bfloat16", "float16"):
            if name in self.matmul_rates:
                return self.matmul_rates[name].value * self.matmul_efficiency.value
        raise config_error(f"the profile {self.name} has no matmul rate for {dtype}")

    def link(self, link: formulas.LinkClass) -> Link:
        return self.within_node if link == "within_node" else self.across_nodes

    def with_network(self, kind: str | None, gigabits: float | None) -> "Hardware":
        """The same with another network between nodes. gigabits: per second and device, None for
        what the profile has. Raises ConfigError for a kind that is none.
        """
        if kind is None and gigabits is None:
            return self
        given = self.across_nodes
        bandwidth = given.shared_bandwidth or given.all_gather.bytes_per_second
        if gigabits is not None:
            bandwidth = gigabits * 1e9 / 8
        kind = kind or given.kind
        try:
            link = Link.model_validate(
                {"kind": kind, "bytes_per_second": bandwidth, "source": "given"}
            )
        except ValidationError:
            known = ["infiniband", "roce", "ethernet", "nvlink"]
            raise config_error(unknown("kind", kind, known, "--network")) from None
        return self.model_copy(update={"across_nodes": link})

    def values(self, dtype: str) -> dict[Symbol, float]:
        """The numbers for the hardware's symbols in the formulas."""
        bandwidth = self.memory_bandwidth.value * self.memory_efficiency.value
        found = {
            formulas.MEMORY_BANDWIDTH: bandwidth,
            formulas.MATMUL_RATE: self.matmul_rate(dtype),
            formulas.OVERLAP: self.overlap.value,
            formulas.MATMUL_SECONDS: _value(self.matmul_seconds, 0),
            layout_formulas.LAYER_SECONDS: _value(self.layer_seconds, 0),
            layout_formulas.IMBALANCE: _value(self.expert_imbalance, 1),
        }
        for link in formulas.LINK_CLASSES:
            for kind in Collective:
                time = self.link(link).time(kind)
                small = time.small or time
                found[formulas.BASE_SECONDS[link, kind]] = time.base_seconds
                found[formulas.PEER_SECONDS[link, kind]] = time.seconds_per_peer
                found[formulas.LINK_BANDWIDTH[link, kind]] = time.bytes_per_second
                found[formulas.SMALL_BASE_SECONDS[link, kind]] = small.base_seconds
                found[formulas.SMALL_PEER_SECONDS[link, kind]] = small.seconds_per_peer
                found[formulas.SMALL_BANDWIDTH[link, kind]] = small.bytes_per_second
                found[formulas.PEER_BANDWIDTH[link, kind]] = (
                    time.bytes_per_second_per_peer or time.bytes_per_second
                )
            exchange = self.link(link).exchange
            found[layout_formulas.EXPERT_LINK_BASE[link]] = exchange.base_seconds
            found[layout_formulas.EXPERT_LINK_BANDWIDTH[link]] = exchange.bytes_per_second
        return found

    @property
    def spreads(self) -> dict[str, float]:
        """How far off each group of constants may be, see `fgtp_pass.cost.uncertainty`."""
        read, computed, latency = (
            _MEASURED if self.calibration is None else self.calibration.typical_spread(*kinds)
            for kinds in (("matmul",), ("matmul",), tuple(kind.value for kind in Collective))
        )
        found = {
            "memory bandwidth": _spread(self.memory_efficiency, read),
            "matmul rate": _spread(self.matmul_efficiency, computed),
            "time per matmul": _spread(self.matmul_seconds, 0),
            "time per layer": _spread(self.layer_seconds, 0),
            "expert imbalance": _spread(self.expert_imbalance, 0),
        }
        for link in formulas.LINK_CLASSES:
            times = [self.link(link).time(kind) for kind in Collective]
            where = link.replace("_", " ")
            found[f"latency {where}"] = _largest([t.latency_spread for t in times], latency)
            found[f"bandwidth {where}"] = _largest([t.bandwidth_spread for t in times], latency)
        return found

    def constants(self) -> list[tuple[str, str, str]]:
        """Name, value with its unit and spread, and source of every constant."""
        rows = [
            ("memory", f"{self.memory.value / 1e9:.4g} GB", self.memory.source),
            (
                "memory_bandwidth",
                f"{self.memory_bandwidth.value / 1e12:.4g} TB/s",
                self.memory_bandwidth.source,
            ),
            *(
                (f"matmul_rates.{dtype}", f"{rate.value / 1e12:.4g} TFLOP/s", rate.source)
                for dtype, rate in self.matmul_rates.items()
            ),
        ]
        for name in ("memory_efficiency", "matmul_efficiency", "overlap"):
            share: Constant | Overlap = getattr(self, name)
            spread = getattr(share, "spread", None)
            off = f" (off by {spread:.0%})" if spread else ""
            rows.append((name, f"{100 * share.value:.3g} %{off}", share.source))
        for name, scale, unit in (
            ("matmul_seconds", 1e6, " us"),
            ("layer_seconds", 1e6, " us"),
            ("expert_imbalance", 1, ""),
        ):
            constant: Constant | None = getattr(self, name)
            if constant is not None:
                off = f" (off by {constant.spread:.0%})" if constant.spread else ""
                rows.append((name, f"{scale * constant.value:.3g}{unit}{off}", constant.source))
        for link in formulas.LINK_CLASSES:
            times = {kind.value: self.link(link).time(kind) for kind in Collective}
            times["experts"] = self.link(link).exchange
            rows += [(f"{link}.{name}", str(time), time.source) for name, time in times.items()]
        return rows


def _value(constant: Constant | None, otherwise: float) -> float:
    return otherwise if constant is None else constant.value


def _spread(constant: Constant | None, otherwise: float) -> float:
    return otherwise if constant is None or constant.spread is None else constant.spread


def _largest(spreads: list[float | None], otherwise: float) -> float:
    return max((otherwise if spread is None else spread) for spread in spreads)


@cache
def profiles() -> Mapping[str, Path]:
    """The profiles that come with the package, by name."""
    return _files("profiles")


@cache
def families() -> Mapping[str, Mapping[str, Any]]:
    """The constants that all devices of a family have in common."""
    return {name: tomllib.loads(path.read_text()) for name, path in _files("families").items()}


def _files(folder: str) -> dict[str, Path]:
    where = Path(str(files("fgtp_pass.cost") / folder))
    return {path.stem: path for path in sorted(where.glob("*.toml"))}


def load(name: str) -> Hardware:
    """The profile of this name, or in this TOML file; the start of one name is enough.

    Raises ConfigError for an unknown name, with the nearest ones, for a file that is none, and for
    several names: the ranks of a group wait for each other, so devices must be equal.
    """
    if "," in name:
        raise config_error(
            f"mixed devices ({name}) are not planned: groups run at the slowest one's pace and "
            "memory. Serve each kind of device by itself."
        )
    started = [one for one in profiles() if one.startswith(f"{name}-")]
    if name not in profiles() and len(started) > 1:
        raise config_error(
            f"there are several profiles of {name!r}: {' and '.join(started)}. Give one of them."
        )
    path = profiles().get(name) or (profiles()[started[0]] if started else Path(name))
    if path.suffix != ".toml" or not path.is_file():
        known = ", ".join(profiles())
        raise config_error(
            unknown("hardware", name, list(profiles()), f"the profiles ({known})")
            + " A path to a .toml file, such as `fgtp calibrate` writes, works too."
        )
    try:
        return Hardware.model_validate(tomllib.loads(path.read_text()))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise config_error(f"{path} is not a TOML file: {error}") from None
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise config_error(f"{path} is not a hardware profile: {wrong}") from None


def detect(device_name: str) -> Hardware | None:
    """The profile of the device that gives itself this name, or None."""
    for name in profiles():
        hardware = load(name)
        if any(
            re.search(rf"(?<!\w){re.escape(p)}(?!\w)", device_name) for p in hardware.device_names
        ):
            return hardware
    return None

"""Hardware profiles: the constants of the formulas, each with its source."""

import tomllib
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from sympy import Symbol

from fgtp_pass.algebra import Collective
from fgtp_pass.cost import formulas
from fgtp_pass.sizes import config_error, unknown


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Constant(_Frozen):
    """A number with its source."""

    value: float = Field(gt=0)
    source: str


class Overlap(_Frozen):
    """The share of the shorter of reading and computing that the longer hides, with its source."""

    value: float = Field(ge=0, le=1)
    source: str


class CollectiveTime(_Frozen):
    """What one collective takes: a latency, more for every further rank, and a bandwidth.

    bytes_per_second: of what one rank sends, counted as `fgtp_pass.algebra.sent_bytes` does (the
    "bus bandwidth" of nccl-tests). bytes_per_second_per_peer: to one other rank, in a mesh without
    a switch; None where a rank can send all of it to one.
    """

    base_seconds: float = Field(ge=0)
    seconds_per_peer: float = Field(ge=0)
    bytes_per_second: float = Field(gt=0)
    bytes_per_second_per_peer: float | None = Field(default=None, gt=0)
    source: str

    def __str__(self) -> str:
        text = (
            f"{1e6 * self.base_seconds:.3g} us + {1e6 * self.seconds_per_peer:.3g} us per peer, "
            f"{self.bytes_per_second / 1e9:.4g} GB/s"
        )
        peer = self.bytes_per_second_per_peer
        return text if peer is None else f"{text}, {peer / 1e9:.4g} GB/s to one peer"


class Link(_Frozen):
    """The collectives over one class of link."""

    kind: Literal["nvlink", "xgmi", "hccs", "pcie", "network", "measured"]
    all_gather: CollectiveTime
    all_to_all: CollectiveTime
    reduce_scatter: CollectiveTime


class Calibration(_Frozen):
    """When and where constants were measured, and how much their times varied.

    machine: its device, in general words. world: group sizes that were measured. spread: per
    measurement, (p90 - p10) / median of its times.
    """

    measured_at: str
    machine: str
    torch: str
    world: tuple[int, ...]
    spread: dict[str, float]


class Hardware(_Frozen):
    """One kind of device and its links.

    device_names: parts of the name that the device gives itself, to detect it by. memory: bytes.
    memory_bandwidth: bytes/s of the data sheet; memory_efficiency: the part of it that a matmul
    with few rows reaches. matmul_rates: FLOP/s by dtype (dense); matmul_efficiency: likewise.
    overlap: see `fgtp_pass.cost.formulas.matmul_seconds`.
    """

    name: str
    title: str
    device_names: tuple[str, ...] = ()
    memory: Constant
    memory_bandwidth: Constant
    memory_efficiency: Constant
    matmul_rates: dict[str, Constant]
    matmul_efficiency: Constant
    overlap: Overlap
    within_node: Link
    across_nodes: Link
    calibration: Calibration | None = None

    def matmul_rate(self, dtype: str) -> float:
        """FLOP/s reached with weights and inputs of `dtype`.

        A dtype that the device has no rate for is computed at its 16-bit rate, as weight-only
        kernels do. Raises ConfigError where there is no such rate either.
        """
        for name in (dtype, "bfloat16", "float16"):
            if name in self.matmul_rates:
                return self.matmul_rates[name].value * self.matmul_efficiency.value
        raise config_error(f"the profile {self.name} has no matmul rate for {dtype}")

    def values(self, dtype: str) -> dict[Symbol, float]:
        """The numbers for the hardware's symbols in the formulas."""
        bandwidth = self.memory_bandwidth.value * self.memory_efficiency.value
        found = {
            formulas.MEMORY_BANDWIDTH: bandwidth,
            formulas.MATMUL_RATE: self.matmul_rate(dtype),
            formulas.OVERLAP: self.overlap.value,
        }
        for link in formulas.LINK_CLASSES:
            for kind in Collective:
                time: CollectiveTime = getattr(getattr(self, link), kind.value)
                found[formulas.BASE_SECONDS[link, kind]] = time.base_seconds
                found[formulas.PEER_SECONDS[link, kind]] = time.seconds_per_peer
                found[formulas.LINK_BANDWIDTH[link, kind]] = time.bytes_per_second
                found[formulas.PEER_BANDWIDTH[link, kind]] = (
                    time.bytes_per_second_per_peer or time.bytes_per_second
                )
        return found

    def constants(self) -> list[tuple[str, str, str]]:
        """Name, value with its unit, and source of every constant."""
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
            rows.append((name, f"{100 * share.value:.3g} %", share.source))
        for link in formulas.LINK_CLASSES:
            for kind in Collective:
                time: CollectiveTime = getattr(getattr(self, link), kind.value)
                rows.append((f"{link}.{kind.value}", str(time), time.source))
        return rows


@cache
def profiles() -> Mapping[str, Path]:
    """The profiles that come with the package, by name."""
    folder = Path(str(files("fgtp_pass.cost") / "profiles"))
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def load(name: str) -> Hardware:
    """The profile of this name, or in this TOML file.

    Raises ConfigError for an unknown name, with the nearest one, for a file that is none, and for
    several names: the ranks of a group wait for each other, so devices must be equal.
    """
    if "," in name:
        raise config_error(
            f"mixed devices ({name}) are not planned: groups run at the slowest one's pace and "
            "memory. Serve each kind of device by itself."
        )
    path = profiles().get(name) or Path(name)
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
        if any(part in device_name for part in hardware.device_names):
            return hardware
    return None

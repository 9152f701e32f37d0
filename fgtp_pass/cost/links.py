"""What collectives take over each class of link."""

import tomllib
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fgtp_pass.algebra.placement import Collective


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SmallMessages(Frozen):
    """The protocol for small messages: as `CollectiveTime`, of lower latency and bandwidth."""

    base_seconds: float = Field(ge=0)
    seconds_per_peer: float = Field(ge=0)
    bytes_per_second: float = Field(gt=0)


class CollectiveTime(Frozen):
    """What one collective takes: a latency, more for every further rank, and a bandwidth.

    bytes_per_second: of what one rank sends, counted as `fgtp_pass.algebra.sent_bytes` does (the
    "bus bandwidth" of nccl-tests). bytes_per_second_per_peer: to one other rank, in a mesh without
    a switch; None where a rank can send all of it to one. small: the protocol for small messages,
    where there is one. latency_spread, bandwidth_spread: how far off they may be, 0.5 for from
    1/1.5 of the value to 1.5 of it; None where only a calibration can say.
    """

    base_seconds: float = Field(ge=0)
    seconds_per_peer: float = Field(ge=0)
    bytes_per_second: float = Field(gt=0)
    bytes_per_second_per_peer: float | None = Field(default=None, gt=0)
    small: SmallMessages | None = None
    latency_spread: float | None = Field(default=None, ge=0)
    bandwidth_spread: float | None = Field(default=None, ge=0)
    source: str

    def __str__(self) -> str:
        text = _protocol(self)
        if self.small is not None:
            text = f"small messages {_protocol(self.small)}; large {text}"
        peer = self.bytes_per_second_per_peer
        text = text if peer is None else f"{text}, {peer / 1e9:.4g} GB/s to one peer"
        spreads = (self.latency_spread, self.bandwidth_spread)
        if None in spreads:
            return text
        return f"{text} (off by {spreads[0]:.0%} and {spreads[1]:.0%})"


def _protocol(time: CollectiveTime | SmallMessages) -> str:
    return (
        f"{1e6 * time.base_seconds:.3g} us + {1e6 * time.seconds_per_peer:.3g} us per peer, "
        f"{time.bytes_per_second / 1e9:.4g} GB/s"
    )


class _Share(Frozen):
    """What a class of links knows of a collective: latencies, and its share of a link's bandwidth.

    small_share: of the protocol for small messages.
    """

    base_seconds: float
    seconds_per_peer: float
    share: float
    small_base_seconds: float | None = None
    small_seconds_per_peer: float = 0
    small_share: float = 0
    latency_spread: float
    bandwidth_spread: float
    source: str

    def time(self, bandwidth: float, peer: float | None, said: str) -> CollectiveTime:
        small = self.small_base_seconds
        return CollectiveTime(
            base_seconds=self.base_seconds,
            seconds_per_peer=self.seconds_per_peer,
            bytes_per_second=self.share * bandwidth,
            bytes_per_second_per_peer=None if peer is None else self.share * peer,
            small=None
            if small is None
            else SmallMessages(
                base_seconds=small,
                seconds_per_peer=self.small_seconds_per_peer,
                bytes_per_second=self.small_share * bandwidth,
            ),
            latency_spread=self.latency_spread,
            bandwidth_spread=self.bandwidth_spread,
            source=f"{self.source}; {said}",
        )


LinkKind = Literal[
    "nvlink", "xgmi", "hccs", "pcie", "infiniband", "roce", "ethernet", "network", "measured"
]


class Link(Frozen):
    """The collectives over one class of link.

    experts: the all_to_all that takes tokens to their experts, by kernels of its own. A link can be
    given as its class and the bytes/s that a device has of it, `bytes_per_second`, in a mesh
    those of one link too, `bytes_per_second_per_peer`: then all else is that of the class, and
    shared_bandwidth says what was given.
    """

    kind: LinkKind
    all_gather: CollectiveTime
    all_to_all: CollectiveTime
    reduce_scatter: CollectiveTime
    all_reduce: CollectiveTime | None = None
    experts: CollectiveTime | None = None
    shared_bandwidth: float | None = None

    @model_validator(mode="before")
    @classmethod
    def _of_class(cls, given: Any) -> Any:
        if not isinstance(given, Mapping) or "bytes_per_second" not in given:
            return given
        classes = link_classes()
        kind = str(given.get("kind"))
        if kind not in classes:
            raise ValueError(f"no class of links {kind!r}; there are {', '.join(classes)}")
        peer = given.get("bytes_per_second_per_peer")
        said = f"bandwidth: {given.get('source', 'given')}"
        times = {
            name: _Share.model_validate(share).time(given["bytes_per_second"], peer, said)
            for name, share in classes[kind].items()
        }
        return {"kind": kind, "shared_bandwidth": given["bytes_per_second"], **times}

    def time(self, kind: Collective) -> CollectiveTime:
        """The constants of a collective. An all_reduce without any is priced as its two halves."""
        given: CollectiveTime | None = getattr(self, kind.value)
        if given is not None:
            return given
        halves = (self.reduce_scatter, self.all_gather)
        peers = [half.bytes_per_second_per_peer or half.bytes_per_second for half in halves]
        return CollectiveTime(
            base_seconds=sum(half.base_seconds for half in halves),
            seconds_per_peer=sum(half.seconds_per_peer for half in halves),
            bytes_per_second=min(half.bytes_per_second for half in halves),
            bytes_per_second_per_peer=min(peers),
            latency_spread=self.reduce_scatter.latency_spread,
            bandwidth_spread=self.reduce_scatter.bandwidth_spread,
            source="a reduce_scatter and an all_gather, one after the other",
        )

    @property
    def exchange(self) -> CollectiveTime:
        """What sending tokens to their experts takes; an all_to_all where nothing else is known."""
        return self.all_to_all if self.experts is None else self.experts


@cache
def link_classes() -> Mapping[str, Mapping[str, Any]]:
    """What is known of each class of links, by collective."""
    folder = Path(str(files("fgtp_pass.cost") / "links"))
    return {p.stem: tomllib.loads(p.read_text()) for p in sorted(folder.glob("*.toml"))}

"""Which ranks form a group: the data-parallel ranks, and the component groups within them."""

import hashlib
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from fgtp_pass.collectives.board import Board
from fgtp_pass.collectives.own_group import OwnGroup


@dataclass(frozen=True)
class ComponentGroup:
    """k consecutive data-parallel ranks that hold one copy of a component between them.

    name: the process group's name, which functional collectives take. rank: this rank's place in
    the group. ranks: global ranks. sums_by_exchange: whether a reduce_scatter is done as an
    all_to_all and a local sum, which sends the same bytes.
    """

    name: str
    size: int
    rank: int
    ranks: tuple[int, ...]
    sums_by_exchange: bool = False


class DataParallelGroup:
    """The data-parallel ranks of this process, and the groups of ours within them.

    process_group: a ProcessGroup, a one-dimensional DeviceMesh, or None for the world. No tensor is
    ever sent over it. timeout: how long a rank waits for the others of its group before it gives
    up. board: what these ranks write for each other. tag: in the names of its groups, tells them
    from those of another one of the same ranks. run_in_step: the sizes of the groups in which ranks
    run something in step, whatever compiled model that is of.
    """

    def __init__(
        self, process_group: Any, timeout: timedelta, board: Board | None = None, tag: str = ""
    ):
        self.process_group = _process_group(process_group)
        self.ranks: tuple[int, ...] = tuple(dist.get_process_group_ranks(self.process_group))
        self.rank: int = dist.get_group_rank(self.process_group, dist.get_rank())
        self.timeout = timeout
        self.board = board or Board(self.process_group)
        self.run_in_step: set[int] = set()
        whole = hashlib.sha1(f"{self.ranks} {timeout}".encode()).hexdigest()[:8]
        self._name = f"{whole}{tag}"
        self._groups: dict[tuple[int, str], OwnGroup] = {}

    @property
    def size(self) -> int:
        return len(self.ranks)

    @property
    def is_alive(self) -> bool:
        """Whether torch.distributed still has the group that this one was made of."""
        try:
            return bool(dist.get_backend(self.process_group))
        except (ValueError, RuntimeError):
            return False

    def component_group(self, size: int) -> ComponentGroup:
        """The group of `size` consecutive ranks that this rank is in. Collective when new."""
        own = self._own_group(size, "data", dist.get_backend(self.process_group))
        if not own.key:
            own.open()
        return ComponentGroup(
            name=own.name,
            size=size,
            rank=own.place,
            ranks=own.ranks,
            sums_by_exchange=own.backend == "gloo",
        )

    def data_group(self, size: int) -> Any:
        """The ProcessGroup of `component_group`, connected. Collective when new or closed."""
        return self._own_group(size, "data", dist.get_backend(self.process_group)).open()

    def words(self, size: int) -> OwnGroup:
        """A gloo group of `size` consecutive ranks for words between hosts, never for tensors.

        Its own group, so that nothing waits for an accelerator.
        """
        return self._own_group(size, "words", "gloo")

    def gloo_group(self, size: int) -> Any:
        """The ProcessGroup of `words`, connected. Collective when new, or when it was closed."""
        return self.words(size).open()

    def collectives_started(self, size: int) -> int:
        """How many this rank has started, over time, on component groups within `size` ranks."""
        return sum(own.collectives_started for own in self._within(size, "data"))

    def close(self, size: int) -> bool:
        """Cut the connections of all groups within this rank's group of `size`.

        Whoever waits on them for this rank fails at once. False if some stay: those of NCCL and
        its like cannot be cut while a kernel waits, and end the process themselves after the
        timeout.
        """
        groups = list(self._within(size))
        for own in groups:
            if own.backend == "gloo":
                own.close()
        return all(own.backend == "gloo" for own in groups)

    def reopen(self, size: int) -> None:
        """Connect what was closed within this rank's group of `size`. Collective if any was."""
        for own in self._within(size):
            own.open()

    def _within(self, size: int, kind: str = "") -> Iterator[OwnGroup]:
        """The groups that were made, in one order on all ranks."""
        for (width, of_kind), own in sorted(self._groups.items()):
            if own.key and size % width == 0 and kind in ("", of_kind):
                yield own

    def _own_group(self, size: int, kind: str, backend: str) -> OwnGroup:
        if (size, kind) not in self._groups:
            first = self.rank // size * size
            ranks = self.ranks[first : first + size]
            self._groups[size, kind] = OwnGroup(
                board=self.board,
                name=f"fgtp_{kind}_{self._name}_{'_'.join(map(str, ranks))}",
                ranks=ranks,
                first=first,
                place=self.rank - first,
                backend=backend,
                timeout=self.timeout,
            )
        return self._groups[size, kind]


_known: list[DataParallelGroup] = []


def data_parallel_group(process_group: Any, timeout: timedelta) -> DataParallelGroup:
    """The one DataParallelGroup of a process group, so that compiled models share its groups."""
    for gone in [known for known in _known if not known.is_alive]:
        gone.close(gone.size)
        _known.remove(gone)
    wanted, board = _process_group(process_group), None
    ranks = tuple(dist.get_process_group_ranks(wanted))
    for known in _known:
        if known.process_group is wanted:
            if known.timeout == timeout:
                return known
            board = known.board
    alike = sum(known.ranks == ranks and known.timeout == timeout for known in _known)
    _known.append(DataParallelGroup(wanted, timeout, board, f"_{alike}" if alike else ""))
    return _known[-1]


def _process_group(given: Any) -> dist.ProcessGroup:
    group = given.get_group() if isinstance(given, DeviceMesh) else given or dist.group.WORLD
    assert isinstance(group, dist.ProcessGroup)
    return group


def hostname() -> str:
    return socket.gethostname()

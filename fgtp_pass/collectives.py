"""The only place that talks to torch.distributed about tensors: groups and collectives on dim 0."""

import socket
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

# Gives the value of `target(*args)`: a node where a graph is written, a tensor where it is run.
Emit = Callable[..., Any]

_FUNCTIONAL = torch.ops._c10d_functional


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


def all_gather(emit: Emit, group: ComponentGroup, x: Any) -> Any:
    """Own [n, ...] -> All [k*n, ...]."""
    return _wait(emit, emit(_FUNCTIONAL.all_gather_into_tensor.default, x, group.size, group.name))


def all_to_all(emit: Emit, group: ComponentGroup, x: Any, rows: Any) -> Any:
    """[k*rows, ...] -> [k*rows, ...]: block i goes to rank i, block i of the result is from it."""
    splits = [rows] * group.size
    moved = emit(_FUNCTIONAL.all_to_all_single.default, x, splits, splits, group.name)
    return _wait(emit, moved)


def reduce_scatter(emit: Emit, group: ComponentGroup, x: Any, rows: Any, features: int) -> Any:
    """Sum [k*rows, features] -> Own [rows, features].

    Over gloo an all_to_all and a local sum are faster than its reduce_scatter
    (benchmarks/README.md), and the local sum accumulates half precision in fp32.
    """
    if group.sums_by_exchange:
        parts = all_to_all(emit, group, x, rows)
        stacked = emit(torch.reshape, parts, (group.size, rows, features))
        return emit(torch.sum, stacked, 0)
    name = _FUNCTIONAL.reduce_scatter_tensor.default
    return _wait(emit, emit(name, x, "sum", group.size, group.name))


def _wait(emit: Emit, x: Any) -> Any:
    return emit(_FUNCTIONAL.wait_tensor.default, x)


class DataParallelGroup:
    """The data-parallel ranks of this process, and the component groups within them.

    process_group: a ProcessGroup, a one-dimensional DeviceMesh, or None for the world.
    timeout: how long a rank waits for the others of its group before it gives up.
    """

    def __init__(self, process_group: Any, timeout: timedelta):
        if isinstance(process_group, DeviceMesh):
            process_group = process_group.get_group()
        group = process_group or dist.group.WORLD
        assert isinstance(group, dist.ProcessGroup)
        self.process_group = group
        self.ranks: tuple[int, ...] = tuple(dist.get_process_group_ranks(self.process_group))
        self.rank: int = dist.get_group_rank(self.process_group, dist.get_rank())
        self.timeout = timeout
        self._groups: dict[tuple[int, str | None], dist.ProcessGroup] = {}

    @property
    def size(self) -> int:
        return len(self.ranks)

    def component_group(self, size: int) -> ComponentGroup:
        """The group of `size` consecutive ranks that this rank is in. Collective when new."""
        group = self._subgroup(size, backend=None)
        first = self.rank // size * size
        return ComponentGroup(
            name=group.group_name,
            size=size,
            rank=self.rank - first,
            ranks=self.ranks[first : first + size],
            sums_by_exchange=dist.get_backend(group) == "gloo",
        )

    def control_group(self, size: int) -> dist.ProcessGroup:
        """A gloo group of `size` consecutive ranks for words between hosts, never for tensors.

        Its own group, so that its timeout is ours and nothing waits for an accelerator.
        """
        return self._subgroup(size, backend="gloo")

    def _subgroup(self, size: int, backend: str | None) -> dist.ProcessGroup:
        if backend is None and size == self.size:
            return self.process_group
        first = self.rank // size * size
        if (size, backend) not in self._groups:
            self._groups[size, backend] = dist.new_group(
                list(self.ranks[first : first + size]),
                timeout=self.timeout,
                backend=backend,
                use_local_synchronization=True,
                group_desc=f"fgtp_{size}_{backend or 'data'}",
            )
        return self._groups[size, backend]


_known: list[DataParallelGroup] = []


def data_parallel_group(process_group: Any, timeout: timedelta) -> DataParallelGroup:
    """The one DataParallelGroup of a process group, so that compiled models share subgroups."""
    group = DataParallelGroup(process_group, timeout)
    for known in _known:
        if known.process_group is group.process_group and known.timeout == timeout:
            return known
    _known.append(group)
    return group


def hostname() -> str:
    return socket.gethostname()

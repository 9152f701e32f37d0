"""`OwnGroup`: a process group that its ranks can make again after a failure.

It has a name and a place on the store of its own: torch.distributed names a group by how many its
process has, so ranks with another number of groups would wait for each other in vain; and a graph,
which names the group, goes on with the one that took its place.

Private names of torch used: `distributed_c10d._new_process_group_helper` and `_world`, of which
`new_group` consists, and `_get_sequence_number_for_group`. Checked with torch 2.11 to 2.13.
"""

import hashlib
import uuid
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

from fgtp_pass.collectives.board import Board, BoardLostError
from fgtp_pass.collectives.waits import Notice, absent, listed
from fgtp_pass.errors import AgreementError, first_line


class OwnGroup:
    """Consecutive data-parallel ranks that are connected, or will be when they next meet.

    ranks: global ranks. first: the data-parallel rank of the first of them; place: this rank's
    among them. key: where on the board these ranks write; new for each time that they are
    connected. exchanges: how often they exchanged words since.
    """

    def __init__(
        self,
        board: Board,
        name: str,
        ranks: Sequence[int],
        first: int,
        place: int,
        backend: str,
        timeout: timedelta,
    ):
        self.name, self.ranks, self.first, self.place = name, tuple(ranks), first, place
        self.backend, self.timeout = backend, timeout
        self.key = ""
        self.exchanges = 0
        self._board = board
        self._group: Any = None

    def open(self) -> Any:
        """The ProcessGroup; made, together with its other ranks, unless it is there.

        Raises AgreementError with the ranks that did not come within the timeout.
        """
        if self._group is None:
            self.key, self.exchanges = self._meet(), 0
            self._group = self._connect()
        return self._group

    @property
    def collectives_started(self) -> int:
        """How many collectives this rank has started since the group was last made."""
        return int(self._group._get_sequence_number_for_group()) if self._group else 0

    def close(self) -> None:
        """Cut the connections, so that whoever waits on them for this rank fails at once."""
        group, self._group = self._group, None
        if group is None:
            return
        group.abort()
        if group in distributed_c10d._world.pg_map:  # else it went with the default group
            dist.destroy_process_group(group)

    def _meet(self) -> str:
        """A key that these ranks have just agreed on, and that was never used."""
        seconds = self.timeout.total_seconds()
        keys = [f"{self.name}/came/{place}" for place in range(len(self.ranks))]
        mine, rank = keys[self.place], self.first + self.place

        def missing(found: Mapping[str, str]) -> list[int]:
            return [self.first + place for place, key in enumerate(keys) if key not in found]

        notice = Notice(rank, "to connect", lambda: missing(self._board.read(keys, seconds)))
        try:
            self._board.write(mine, uuid.uuid4().hex, seconds)
            found = self._board.wait(keys, seconds, notice, self._board.is_new)
            if len(found) < len(keys):
                self._board.erase(mine)
                text = absent(missing(found), seconds, "to connect with its group")
                raise AgreementError(text, away=True)
        except BoardLostError as lost:
            text = f"rank {rank} cannot connect with its group: {lost}"
            raise AgreementError(text, away=True) from None
        self._board.seen.update(found)
        return hashlib.sha1("".join(found[key] for key in keys).encode()).hexdigest()

    def _connect(self) -> Any:
        try:
            group, _ = distributed_c10d._new_process_group_helper(
                len(self.ranks),
                self.place,
                list(self.ranks),
                dist.Backend(self.backend),
                self._board.part(self.key),
                distributed_c10d.GroupName(self.name),
                timeout=self.timeout,
                group_desc=self.name,
            )
        except RuntimeError as error:
            others = listed(r for r in range(self.first, self.first + len(self.ranks)))
            raise AgreementError(
                f"{others} came to connect, but not all stayed: {first_line(error)}",
                away=True,
            ) from error
        distributed_c10d._world.pg_group_ranks[group] = dict(
            zip(self.ranks, range(len(self.ranks)), strict=True)
        )
        return group

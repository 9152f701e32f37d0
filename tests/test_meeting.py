"""Meetings of many ranks: threads of one process, each with a connection to the store."""

import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from fgtp_pass.agreement.meeting import Meeting
from fgtp_pass.agreement.message import Intent
from fgtp_pass.collectives import waits
from fgtp_pass.collectives.board import Board
from fgtp_pass.errors import AgreementError

SECOND = timedelta(seconds=1)


class _Counted(dist.Store):  # type: ignore[misc]
    """A store that notes which keys are asked for."""

    def __init__(self, store: Any) -> None:
        super().__init__()
        self._store = store
        self.asked: list[str] = []

    def set(self, key: str, value: bytes) -> None:
        self._store.set(key, value)

    def get(self, key: str) -> bytes:
        self.asked.append(key)
        value: bytes = self._store.get(key)
        return value

    def check(self, keys: list[str]) -> bool:
        self.asked += keys
        return bool(self._store.check(keys))

    def deleteKey(self, key: str) -> bool:  # the name under which torch calls it
        return bool(self._store.delete_key(key))


@dataclass
class _Group:
    """What a meeting needs of a data-parallel group."""

    rank: int
    size: int
    timeout: timedelta
    store: Any

    def __post_init__(self) -> None:
        self.board = Board(self)  # type: ignore[arg-type]

    def get_group_store(self) -> Any:
        return self.store


@pytest.fixture
def keeper() -> Any:
    return dist.TCPStore("127.0.0.1", 0, None, True, 30 * SECOND, wait_for_workers=False)


def groups(keeper: Any, size: int, seconds: float = 30) -> list[_Group]:
    return [
        _Group(
            rank,
            size,
            seconds * SECOND,
            dist.TCPStore("127.0.0.1", keeper.port, None, False, 30 * SECOND),
        )
        for rank in range(size)
    ]


def together(work: Callable[[_Group], Any], of: list[_Group]) -> list[Any]:
    with ThreadPoolExecutor(len(of)) as pool:
        return list(pool.map(work, of))


def _meets(group: _Group, times: int = 1) -> list[list[Any]]:
    meeting: Any = Meeting(group)  # type: ignore[arg-type]
    return [
        [(m.rank, m.payload) for m in meeting.exchange(Intent.SHARD, (group.rank // 3, turn))]
        for turn in range(times)
    ]


def test_many_ranks_hear_what_each_said(keeper: Any) -> None:
    size = 24
    want = [[(rank, (rank // 3, turn)) for rank in range(size)] for turn in range(2)]
    for heard in together(lambda group: _meets(group, 2), groups(keeper, size)):
        assert heard == want


def test_what_a_rank_asks_for_does_not_grow_with_their_number(
    keeper: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where one is late, so that all others want to know for whom they wait."""
    monkeypatch.setattr(waits, "NOTICE_SECONDS", 0.2)
    of = groups(keeper, 16)
    asks = _Counted(of[5].store)
    of[5] = _Group(5, 16, 30 * SECOND, asks)

    def work(group: _Group) -> None:
        time.sleep(2.0 if group.rank == 9 else 0.0)
        _meets(group)

    together(work, of)
    kinds = {key.removeprefix("fgtp/").split("/")[0] for key in asks.asked}
    assert kinds == {"came", "away", "heard", "verdict"}
    assert {key for key in asks.asked if "came" in key} == {"fgtp/came/0"}


def test_who_is_late_is_told_by_all(
    keeper: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(waits, "NOTICE_SECONDS", 0.2)
    of = groups(keeper, 4)
    together(_meets, of)

    def late(rank: int) -> list[str]:
        def work(group: _Group) -> None:
            time.sleep(2.0 if group.rank == rank else 0.0)
            _meets(group)

        caplog.clear()
        with caplog.at_level(logging.WARNING, "fgtp_pass"):
            together(work, of)
        return sorted(record.getMessage().split(" s for ")[1] for record in caplog.records)

    assert late(2) == ["rank 2, to agree on a plan"] * 3
    assert late(0) == ["rank 0, to agree on a plan"] * 3


@pytest.mark.parametrize("away", [0, 2])
def test_who_does_not_come_is_named_by_all_and_all_can_meet_again(keeper: Any, away: int) -> None:
    of = groups(keeper, 4, seconds=1)

    def work(group: _Group) -> str:
        try:
            _meets(group)
        except AgreementError as error:
            return str(error)
        return "met"

    for said in together(work, [group for group in of if group.rank != away]):
        assert f"rank {away} did not come within 1 s, to agree on a plan" in said
    assert together(work, of) == ["met"] * 4


def test_nothing_is_left_on_the_store(keeper: Any) -> None:
    of = groups(keeper, 8)
    together(_meets, of)
    after_one = keeper.num_keys()
    together(lambda group: _meets(group, 5), of)
    assert keeper.num_keys() == after_one


def test_a_key_that_is_erased_while_it_is_read_is_no_lost_store() -> None:
    class Erased(_Counted):
        def get(self, key: str) -> bytes:
            raise dist.DistStoreError("wait timeout")

        def check(self, keys: list[str]) -> bool:
            return True

    board = Board(_Group(0, 1, SECOND, Erased(None)))  # type: ignore[arg-type]
    assert board.read(["key"]) == {}
    assert board.wait(["key", "other"], 0.1) == {}

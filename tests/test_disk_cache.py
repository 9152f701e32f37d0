"""What is kept between runs stops nobody: files that cannot be read, disks that are full."""

import os
import threading
from pathlib import Path

import pytest
from marks import quick
from pydantic import BaseModel

from fgtp_pass import disk_cache

pytestmark = quick


class Kept(BaseModel):
    numbers: list[int]


@pytest.fixture
def at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FGTP_CACHE_DIR", str(tmp_path / "cache"))
    return disk_cache.path_of("test", "key")


def test_what_is_saved_is_loaded(at: Path) -> None:
    disk_cache.save(at, Kept(numbers=[1, 2]))
    assert disk_cache.load(at, Kept) == Kept(numbers=[1, 2])
    assert list(at.parent.iterdir()) == [at]


@pytest.mark.parametrize("content", [b"\xff\xfe\x00garbage", b'{"numbers": [1, ', b"", b"[]"])
def test_what_cannot_be_read_is_not_there(at: Path, content: bytes) -> None:
    at.parent.mkdir()
    at.write_bytes(content)
    assert disk_cache.load(at, Kept) is None
    disk_cache.save(at, Kept(numbers=[3]))
    assert disk_cache.load(at, Kept) == Kept(numbers=[3])


def test_a_folder_in_the_place_of_the_file(at: Path) -> None:
    at.mkdir(parents=True)
    assert disk_cache.load(at, Kept) is None
    with pytest.raises(OSError, match="directory"):
        disk_cache.save(at, Kept(numbers=[1]))
    assert list(at.parent.iterdir()) == [at]


def test_a_disk_that_is_full(at: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was there stays, and nothing is left behind."""
    disk_cache.save(at, Kept(numbers=[1]))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        disk_cache.save(at, Kept(numbers=[2]))
    assert disk_cache.load(at, Kept) == Kept(numbers=[1])
    assert list(at.parent.iterdir()) == [at]


def test_readers_beside_writers_see_whole_files(at: Path) -> None:
    whole = [Kept(numbers=[i] * 20_000) for i in range(2)]
    disk_cache.save(at, whole[0])

    def write(value: Kept) -> None:
        for _ in range(40):
            disk_cache.save(at, value)

    writers = [threading.Thread(target=write, args=(value,)) for value in whole]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert disk_cache.load(at, Kept) in whole


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FGTP_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)

    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", unknown)
    assert str(os.getuid()) in disk_cache.cache_folder().name

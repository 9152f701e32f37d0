"""torchrun on two hosts, which are network namespaces with a disk each."""

from pathlib import Path

import pytest
import zoo
from two_hosts import two_hosts

HERE = Path(__file__).parent


def test_load_save_and_update_on_two_hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{HERE}:{HERE.parent}")
    with two_hosts(tmp_path) as hosts:
        model = zoo.build("llama")
        model.save_pretrained(tmp_path / "shared")
        model.save_pretrained(hosts.hosts[0].disk / "checkpoint")
        shared, disk = str(tmp_path / "shared"), str(hosts.disk)
        printed = hosts.torchrun(HERE / "on_two_hosts.py", shared, disk, timeout=600)
    for rank, text in enumerate(printed):
        assert f"rank {rank} on {hosts.hosts[rank].name}: all as it should be" in text
    by_host = [{p.name for p in (host.disk / "shards").iterdir()} for host in hosts.hosts]
    assert by_host[0] & by_host[1] == {"fgtp_shards.json", "config.json", "generation_config.json"}
    assert all(any(name.endswith(".safetensors") for name in names) for names in by_host)
    assert len(list((tmp_path / "shared" / "shards").glob("*.safetensors"))) == 2

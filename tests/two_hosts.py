"""Two hosts on this machine: network namespaces, joined by a pair of virtual interfaces.

Each has a name, an address and a disk of its own, as torchrun sees it.
"""

import ctypes
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

_NAMES = 0x04000000  # CLONE_NEWUTS


@dataclass(frozen=True)
class Host:
    """number: its node rank. disk: what it has at the path that all hosts call `Hosts.disk`."""

    number: int
    name: str
    address: str
    disk: Path

    @property
    def interface(self) -> str:
        return f"{self.name}-eth"

    def enter(self) -> None:
        """Let this thread, and what it starts, be in the network of this host."""
        with open(f"/run/netns/{self.name}") as network:
            _call("setns", network.fileno(), 0)

    def be(self) -> None:
        """Let this thread, and what it starts, be in its network and under its name."""
        self.enter()
        _call("unshare", _NAMES)
        socket.sethostname(self.name)


@dataclass(frozen=True)
class Hosts:
    """disk: a path at which each host has a disk of its own. names: which name is which address."""

    hosts: tuple[Host, Host]
    disk: Path
    names: Path

    def torchrun(self, script: Path, *arguments: str, timeout: float) -> list[str]:
        """Run a script with one rank per host; what each host printed. Fails if one does."""
        processes = [
            subprocess.Popen(
                self._command(host, script, arguments),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=os.environ | {"GLOO_SOCKET_IFNAME": host.interface, "OMP_NUM_THREADS": "1"},
            )
            for host in self.hosts
        ]
        try:
            printed = [process.communicate(timeout=timeout)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
        failed = [p.returncode for p in processes if p.returncode]
        assert not failed, "\n".join(
            f"--- {h.name}\n{t}" for h, t in zip(self.hosts, printed, strict=True)
        )
        return printed

    def _command(self, host: Host, script: Path, arguments: tuple[str, ...]) -> list[str]:
        run = [
            sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1",
            f"--node-rank={host.number}", "--rdzv-backend=c10d", "--rdzv-id=test",
            f"--rdzv-endpoint={self.hosts[0].address}:29500", f"--local-addr={host.address}",
            str(script), *arguments,
        ]  # fmt: skip
        own = (
            f"mount --bind {host.disk} {self.disk} && mount --bind {self.names} /etc/hosts"
            f' && hostname {host.name} && exec "$@"'
        )
        return [
            "ip", "netns", "exec", host.name, "unshare", "--uts", "--mount",
            "sh", "-c", own, "sh", *run,
        ]  # fmt: skip


@contextmanager
def two_hosts(folder: Path) -> Iterator[Hosts]:
    """Two hosts while it is entered, with disks in `folder`. Skips the test without the rights."""
    made = [
        Host(n, f"fgtp{os.getpid()}{n}", f"10.97.83.{n + 1}", folder / f"disk{n}") for n in (0, 1)
    ]
    hosts = Hosts((made[0], made[1]), folder / "disk", folder / "hosts")
    hosts.names.write_text("".join(f"{host.address} {host.name}\n" for host in made))
    for path in (hosts.disk, made[0].disk, made[1].disk):
        path.mkdir()
    try:
        if not all(_ip(f"netns add {host.name}") for host in made):
            pytest.skip("needs `ip` and the right to make network namespaces (root, Linux)")
        ends = [host.interface for host in made]
        joined = f"link add {ends[0]} netns {made[0].name} type veth peer name {ends[1]}"
        assert _ip(f"{joined} netns {made[1].name}")
        for host, end in zip(made, ends, strict=True):
            assert _ip(f"-n {host.name} addr add {host.address}/24 dev {end}")
            assert _ip(f"-n {host.name} link set {end} up")
            assert _ip(f"-n {host.name} link set lo up")
        yield hosts
    finally:
        for host in made:
            _ip(f"netns delete {host.name}")


def _call(function: str, *arguments: int) -> None:
    """Call a function of the C library that Python 3.11 has not."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc[function](*arguments):
        raise OSError(ctypes.get_errno(), function)


def _ip(command: str) -> bool:
    """Run `ip` with these arguments; whether it could."""
    try:
        return subprocess.run(["ip", *command.split()], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False

"""Process groups that are the host's: for how long its collectives wait on them, and cutting them.

Over gloo only. Private names of torch used: `ProcessGroup._device_types` and `_get_backend`, and
`_set_default_timeout` of what that gives, of which `distributed_c10d._set_pg_timeout` consists.
"""

import contextlib
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


def limit_waits(process_group: dist.ProcessGroup, timeout: timedelta) -> None:
    """Let every collective that begins from now on give up after `timeout`."""
    backend = _gloo(process_group)
    if backend is not None:
        backend._set_default_timeout(timeout)


def cut(process_group: dist.ProcessGroup) -> None:
    """Close the connections, so that whoever waits on them for this rank fails at once.

    gloo closes those of a group in which a collective takes too long; `abort` does not.
    """
    backend = _gloo(process_group)
    if backend is not None:
        backend._set_default_timeout(timedelta(milliseconds=1))
        with contextlib.suppress(RuntimeError):
            backend.barrier().wait()


def _gloo(process_group: Any) -> Any:
    """The backend for tensors in host memory, if it is gloo."""
    host = torch.device("cpu")
    if host not in process_group._device_types:
        return None
    backend = process_group._get_backend(host)
    return backend if backend.name() == "gloo" else None

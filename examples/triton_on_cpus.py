"""Triton's interpreter as the backend of CPUs, which vLLM's V2 model runner then runs on."""

import os
from types import SimpleNamespace
from typing import Any


class _Driver:
    @staticmethod
    def is_active() -> bool:
        return True


def install() -> None:
    """Before vLLM is imported. Does nothing where TRITON_INTERPRET is not set."""
    if "TRITON_INTERPRET" not in os.environ:
        return
    from triton import backends

    cpu: Any = SimpleNamespace(driver=_Driver, compiler=None)
    backends.backends["cpu"] = cpu

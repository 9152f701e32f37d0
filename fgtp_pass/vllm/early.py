"""What must be changed while vLLM is being imported, an entry point of `vllm.platform_plugins`:
`CompilationConfig` gets its field `passes`, and `LLM` may be given a data_parallel_size.

General plugins load too late for both. Nothing here acts unless `passes` is given.
"""

import functools
import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import field
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import Any

from fgtp_pass.sizes import nearest_hint
from fgtp_pass.vllm import PASS

_COMPILATION = "vllm.config.compilation"
_BASE_OF_LLM = "vllm.entrypoints.common.offline"


def check_passes(passes: list[str]) -> list[str]:
    """Raise ValueError for a name in `CompilationConfig.passes` that is no pass of ours."""
    for name in passes:
        if name != PASS:
            raise ValueError(f"unknown pass {name!r} in passes.{nearest_hint(name, [PASS])}")
    return passes


def prepare() -> None:
    """Platform plugin that offers no platform.

    vLLM probes platforms while `vllm.config.compilation` is being imported, which is the one time
    at which `CompilationConfig` can still be given a field: after that, pydantic has built it, and
    `LLM(compilation_config={...})` is converted before general plugins load.
    """
    module = sys.modules.get(_COMPILATION)
    if module is None or hasattr(module, "CompilationConfig"):
        return
    module.config = _with_passes(module.config)  # type: ignore[attr-defined]
    if _BASE_OF_LLM not in sys.modules:
        sys.meta_path.insert(0, _AfterImport(_BASE_OF_LLM, _wrap_llm))


def _with_passes(decorate: Any) -> Any:
    @functools.wraps(decorate)
    def config(cls: Any = None, **kwargs: Any) -> Any:
        if cls is None:
            return lambda cls: config(cls, **kwargs)
        if cls.__name__ == "CompilationConfig":
            _add_field(cls)
        return decorate(cls, **kwargs) if kwargs else decorate(cls)

    return config


def _add_field(cls: Any) -> None:
    from pydantic import field_validator

    def as_list(value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    cls.__annotations__["passes"] = list[str]
    cls.passes = field(default_factory=list)
    cls._fgtp_passes_as_list = field_validator("passes", mode="before")(staticmethod(as_list))
    cls._fgtp_check_passes = field_validator("passes")(staticmethod(check_passes))
    cls.compute_hash = _stock_hash_without_passes(cls.compute_hash)


def _stock_hash_without_passes(compute_hash: Any) -> Any:
    """`passes` is a part of the hash where it asks for something, and leaves no trace elsewhere."""

    @functools.wraps(compute_hash)
    def wrapped(self: Any) -> str:
        if self.passes:
            return str(compute_hash(self))
        from unittest import mock

        from vllm.config import utils

        stock = utils.get_hash_factors

        def without(config: Any, ignored: set[str]) -> Any:
            return stock(config, ignored | {"passes"})

        with mock.patch.object(utils, "get_hash_factors", without):
            return str(compute_hash(self))

    return wrapped


class _AfterImport(MetaPathFinder):
    """Calls `then(module)` when the module `name` has been imported."""

    def __init__(self, name: str, then: Callable[[ModuleType], None]):
        self._name, self._then = name, then

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                self._then(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _wrap_llm(module: Any) -> None:
    """Wrap `LLM.__init__` as the class is made: it refuses data_parallel_size before it loads
    general plugins, and its module is half imported when platforms are probed.
    """

    def init_subclass(cls: Any, /, **kwargs: Any) -> None:
        super(module.OfflineInferenceMixin, cls).__init_subclass__(**kwargs)
        if (cls.__module__, cls.__name__) == ("vllm.entrypoints.llm", "LLM"):
            wrap(cls, "__init__", _init_llm)

    module.OfflineInferenceMixin.__init_subclass__ = classmethod(init_subclass)


def _init_llm(stock: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    compilation, ranks = kwargs.get("compilation_config"), kwargs.get("data_parallel_size", 1)
    if isinstance(compilation, dict):
        passes = compilation.get("passes", ())
    else:
        passes = getattr(compilation, "passes", ())
    if ranks == 1 or PASS not in ([passes] if isinstance(passes, str) else passes):
        stock(self, *args, **kwargs)
        return
    from fgtp_pass.vllm.offline import start

    start(stock, self, *args, **kwargs)


def wrap(owner: Any, name: str, wrapper: Any) -> None:
    """Replace a method by `wrapper`, which gets the stock one as its first argument."""
    stock = getattr(owner, name)

    @functools.wraps(stock)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrapper(stock, *args, **kwargs)

    wrapped._fgtp = True  # type: ignore[attr-defined]
    static = isinstance(inspect.getattr_static(owner, name), staticmethod)
    setattr(owner, name, staticmethod(wrapped) if static else wrapped)

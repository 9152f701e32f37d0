"""What must be changed while vLLM is being imported, an entry point of `vllm.platform_plugins`:
`CompilationConfig` gets its field `passes`, `LLM` may be given a data_parallel_size, and a command
line of which vLLM would drop `passes` is refused.

General plugins load too late: `LLM(compilation_config={...})` is converted, data_parallel_size
refused, and a command line may be read before they are loaded. Nothing here acts unless `passes` is
given.
"""

import dataclasses
import functools
import importlib.util
import inspect
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import Annotated, Any

from fgtp_pass.hints import nearest_hint
from fgtp_pass.vllm import PASS, asks

_HOLDER = "vllm.config.vllm"  # of VllmConfig, into which pydantic builds CompilationConfig
_BASE_OF_LLM = "vllm.entrypoints.common.offline"


def check_passes(passes: list[str]) -> list[str]:
    """Raise ValueError for a name in `CompilationConfig.passes` that is no pass of ours."""
    for name in passes:
        if name != PASS:
            raise ValueError(f"unknown pass {name!r} in passes.{nearest_hint(name, [PASS])}")
    return passes


def prepare() -> None:
    """Platform plugin that offers no platform. Idempotent.

    vLLM probes platforms early in its import, at a place that differs from version to version;
    `VllmConfig` comes after `CompilationConfig` in each, so the field is added in between, or to
    both where they are there already.
    """
    watch_command_lines()
    holder = sys.modules.get(_HOLDER)
    if hasattr(holder, "VllmConfig"):
        add_passes()
    elif not any(isinstance(finder, _AtImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AtImport(_HOLDER, before=lambda _module: add_passes()))
        if _BASE_OF_LLM not in sys.modules:
            sys.meta_path.insert(0, _AtImport(_BASE_OF_LLM, after=_wrap_llm))


def add_passes() -> None:
    """Give `CompilationConfig` the field `passes`. Idempotent."""
    from pydantic import AfterValidator, BeforeValidator
    from pydantic.dataclasses import rebuild_dataclass
    from vllm.config.compilation import CompilationConfig

    if "passes" in CompilationConfig.__dataclass_fields__:
        return

    def as_list(value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    kind: Any = Annotated[list[str], BeforeValidator(as_list), AfterValidator(check_passes)]
    model = dataclasses.make_dataclass(
        "passes", [("passes", kind, dataclasses.field(default_factory=list))]
    )
    CompilationConfig.__annotations__["passes"] = kind
    (passes,) = dataclasses.fields(model)
    CompilationConfig.__dataclass_fields__["passes"] = passes
    CompilationConfig.compute_hash = _stock_hash_without_passes(CompilationConfig.compute_hash)
    rebuild_dataclass(CompilationConfig, force=True)
    holder = sys.modules.get(_HOLDER)
    if hasattr(holder, "VllmConfig"):
        rebuild_dataclass(holder.VllmConfig, force=True)  # type: ignore[union-attr]


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


class _AtImport(MetaPathFinder):
    """Calls `before(module)` and `after(module)` when the module `name` is imported."""

    def __init__(
        self,
        name: str,
        before: Callable[[ModuleType], None] = lambda _module: None,
        after: Callable[[ModuleType], None] = lambda _module: None,
    ):
        self._name, self._before, self._after = name, before, after

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                self._before(module)
                execute(module)
                self._after(module)

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


def watch_command_lines() -> None:
    """Let vLLM's parser refuse a command line of which it drops `passes`. Idempotent."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    if not getattr(FlexibleArgumentParser.parse_known_args, "_fgtp", False):
        wrap(FlexibleArgumentParser, "parse_known_args", _parse_known_args)


def _parse_known_args(stock: Any, self: Any, args: Any = None, namespace: Any = None) -> Any:
    """args: with the dotted options and those of a file put together, as `parse_args` does."""
    found, rest = stock(self, args, namespace)
    if args is not None and hasattr(found, "compilation_config"):
        from fgtp_pass.vllm.settings import refuse_dropped

        refuse_dropped(args, found.compilation_config)
    return found, rest


def _init_llm(stock: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    if kwargs.get("data_parallel_size", 1) == 1 or not asks(kwargs.get("compilation_config")):
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

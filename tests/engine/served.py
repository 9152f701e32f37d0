"""Commands that the planner prints or the docs show, read by `vllm serve`'s own parser."""

import os
import shlex
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType


@contextmanager
def _beside_ascend(wanted: bool) -> Iterator[None]:
    """Within it vLLM-Ascend seems to be installed, if that is wanted."""
    name = "vllm_ascend"
    if wanted:
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__spec__ = ModuleSpec(name, None)
    try:
        yield
    finally:
        sys.modules.pop(name, None)


def refusals(
    commands: dict[str, str], folders: dict[str, str], on_ascend: Collection[str] = ()
) -> dict[str, str]:
    """What vLLM says against each command, by name, "" for nothing.

    on_ascend: the names of those that run where vLLM-Ascend, which takes sizes without the pass, is
    installed.

    The engine configuration is built from it, as `vllm serve` does before it loads any weight.
    folders: what stands for the models that the commands name.
    """
    os.environ["VLLM_LOGGING_LEVEL"] = "WARNING"
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.plugins import load_general_plugins
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    load_general_plugins()
    parser = make_arg_parser(FlexibleArgumentParser())
    found = {}
    for name, command in commands.items():
        program, serve, model, *flags = shlex.split(command)
        assert (program, serve) == ("vllm", "serve")
        try:
            given = parser.parse_args([folders[model], *flags, "--skip-tokenizer-init"])
            given.model = given.model_tag  # as `vllm serve` does
            with _beside_ascend(name in on_ascend):
                AsyncEngineArgs.from_cli_args(given).create_engine_config(headless=given.headless)
            found[name] = ""
        except (Exception, SystemExit) as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found

"""Commands that the planner prints, read by `vllm serve`'s own parser; a process of its own."""

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType


@contextmanager
def _for_ascend(command: str) -> Iterator[None]:
    """A command of sizes alone is vLLM-Ascend's, which is installed where it runs."""
    name = "vllm_ascend"
    if "finegrained_tp_config" in command and "passes" not in command:
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__spec__ = ModuleSpec(name, None)
    try:
        yield
    finally:
        sys.modules.pop(name, None)


def refusals(commands: dict[str, str], folders: dict[str, str]) -> dict[str, str]:
    """What vLLM says against each command, by name, "" for nothing.

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
            with _for_ascend(command):
                AsyncEngineArgs.from_cli_args(given).create_engine_config()
            found[name] = ""
        except (Exception, SystemExit) as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found

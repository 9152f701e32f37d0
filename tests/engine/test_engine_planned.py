"""Commands that the planner prints, and those of the docs, are taken by vLLM: by its own parser and
configuration.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from served import refusals
from typer.testing import CliRunner

from fgtp_pass.cli.app import app
from fgtp_pass.models.config_json import read_config

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
# beside the examples of the docs, on devices whose command is vLLM's own
MORE = (
    "fgtp plan deepseek-ai/DeepSeek-R1 --devices 32 --hardware h200 --batch 24 --mtp",
    "fgtp plan deepseek-ai/DeepSeek-R1 --devices 16 --hardware h200 --tpot 50 --kv-dtype fp8",
    "fgtp plan meta-llama/Llama-3.1-8B --devices 4 --hardware l40s --quantization fp8 --sizes 2",
)


def examples() -> list[str]:
    """The lines of the docs that plan a model."""
    text = "\n".join(page.read_text() for page in PAGES)
    return [line for line in re.findall(r"^fgtp plan .*/.*$", text, re.M) if "MODEL" not in line]


def shown() -> dict[str, str]:
    """The `vllm serve` commands in the blocks of the docs, by page and number."""
    found = {}
    for page in PAGES:
        blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
        text = "\n".join(blocks).replace("\\\n", " ")
        for i, command in enumerate(re.findall(r"^vllm serve (?:[^'\n]|'[^']*')+", text, re.M)):
            found[f"{page.name} {i}"] = command.partition(" #")[0]
    return found


def planned(example: str) -> dict[str, str]:
    """By layout, the command that the planner prints for it."""
    words = re.sub(r" --(html|png) \S+", "", example)
    done = CliRunner().invoke(app, [*shlex.split(words)[1:], "--json"])
    assert done.exit_code == 0, done.output
    layouts = json.loads(done.stdout)["layouts"]
    # a method of vLLM-Ascend's that vLLM itself does not know
    return {
        f"{example}: {layout['name']}": layout["command"].replace(" --quantization ascend", "")
        for layout in layouts
        if layout["command"]
    }


def folders_of(names: Iterable[str], parent: Path) -> dict[str, str]:
    """A folder for each model, with its configuration."""
    folders = {}
    for name in names:
        folder = parent / name.replace("/", "--")
        folder.mkdir()
        config = dict(read_config(name))
        config.pop("quantization_config", None)  # the CPU's vLLM has no kernels for it
        (folder / "config.json").write_text(json.dumps(config))
        folders[name] = str(folder)
    return folders


def test_vllm_takes_every_command(
    engines: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FGTP_CACHE_DIR", str(tmp_path / "cache"))
    found = examples()
    assert len(found) >= 3
    commands: dict[str, str] = {}
    for example in (*found, *MORE):
        commands |= planned(example)
    assert any("--speculative-config" in command for command in commands.values())
    assert any("finegrained_tp_config" in command for command in commands.values())
    folders = folders_of({shlex.split(c)[2] for c in commands.values()}, tmp_path)
    commands["refused"] = commands[next(iter(commands))] + " --max-model-length 4096"
    on_ascend = {name for name in commands if "--hardware ascend" in name}
    (said,) = engines(1).run(refusals, commands, folders, on_ascend, timeout=300)
    assert said.pop("refused") == "SystemExit: 2"
    assert {name: error for name, error in said.items() if error} == {}


def test_vllm_takes_the_commands_of_the_docs(
    engines: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FGTP_CACHE_DIR", str(tmp_path / "cache"))
    commands = shown()
    assert {name.partition(" ")[0] for name in commands} >= {"README.md", "nodes.md", "drafters.md"}
    small = "meta-llama/Llama-3.1-8B"  # for what the docs leave open
    names = {shlex.split(command)[2] for command in commands.values()} | {small}
    folders = folders_of(names - {"MODEL"}, tmp_path)
    folders["MODEL"] = folders[small]
    commands = {
        name: command.replace('"DRAFTER"', json.dumps(folders[small]))
        for name, command in commands.items()
    }
    (said,) = engines(1).run(refusals, commands, folders, timeout=300)
    assert {name: error for name, error in said.items() if error} == {}

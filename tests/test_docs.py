"""The documentation names what exists: files, error texts, components, options."""

import ast
import re
import shlex
from pathlib import Path

import pytest
import typer
from marks import quick
from version_matrix import MATRIX

from fgtp_pass.cli.app import app
from fgtp_pass.options.options import Options
from fgtp_pass.patterns import BUILTIN

pytestmark = quick

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    missing = [t for t in targets if "://" not in t and not (page.parent / t).exists()]
    assert not missing


def _literals() -> str:
    """Every string of the package; where a value is filled in stands a line break."""
    found = []
    for path in [*ROOT.glob("fgtp_pass/**/*.py"), *ROOT.glob("patterns/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [p.value if isinstance(p, ast.Constant) else "\n" for p in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n\n".join(found)


def test_error_texts_are_those_of_the_code() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    texts = [text for row in rows for text in re.findall(r"`([^`]+)`", row.split(" | ")[0])]
    code = _literals()
    parts = [part.strip(" '\"") for text in texts for part in re.split(r"\.\.\.|NAME", text)]
    unknown = [part for part in parts if len(part) > 12 and part not in code]
    assert not unknown


def test_the_matrix_of_versions_is_documented() -> None:
    page = (ROOT / "docs" / "support.md").read_text()
    for row in MATRIX:
        assert f"`python tools/version_matrix.py {row.name}`" in page
        assert re.search(rf"^\| {row.torch} \| {row.python} \| .* {row.name}", page, re.MULTILINE)


def test_the_tree_has_every_room() -> None:
    tree = (ROOT / "CONTRIBUTING.md").read_text().partition("## Layout")[2]
    rooms = {path.parent.name for path in ROOT.glob("fgtp_pass/*/__init__.py")}
    assert set(re.findall(r"^  ([a-z_]+)/ ", tree, re.MULTILINE)) == rooms


def test_components_and_options_are_documented() -> None:
    components = (ROOT / "docs" / "components.md").read_text()
    options = (ROOT / "docs" / "compile.md").read_text()
    for pattern in BUILTIN:
        assert f"| `{pattern.component}` |" in components
        for key in (pattern.config_key, *pattern.aliases):
            assert f"`{key}`" in options
    for name in Options.model_fields:
        assert f"| `{name}` |" in options


def _code(page: Path) -> tuple[str, str]:
    """What stands in blocks of code, with continued lines joined, and what in a line of text."""
    text = page.read_text()
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    rest = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return "".join(blocks).replace("\\\n", " "), "\n".join(re.findall(r"`([^`]+)`", rest))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_work_from_a_clone(page: Path) -> None:
    blocks, words = _code(page)
    code = f"{blocks}\n{words}"
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = re.findall(r"^make (?:[A-Z]+=\S+ )?([a-z-]+)", code, re.MULTILINE)
    assert set(named) <= set(targets)
    scripts = re.findall(r"python (\S+\.py)", code)
    assert [script for script in scripts if not (ROOT / script).exists()] == []
    installed = " ".join(re.findall(r"pip install (.*)", code)).split()
    assert not {"fgtp-pass", "fgtp_pass"} & set(installed), "nothing is published: pip install ."
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for line in re.findall(r"^fgtp (.+)$", blocks, re.MULTILINE):
        name, *given = shlex.split(re.sub(r"\bN\b", "8", line.partition(" #")[0]))
        if name in commands:  # and not a line of a log
            commands[name].make_context(name, given)  # raises for an option that there is not

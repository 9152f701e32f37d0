"""The rooms of the package: each `__init__` says what it may import and what may import it."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from marks import quick
from ranks import HANG

pytestmark = quick

PACKAGE = Path(__file__).parents[1] / "fgtp_pass"
ROOMS = sorted(p.name for p in PACKAGE.iterdir() if (p / "__init__.py").exists())
NO_TORCH = ["fgtp_pass", "fgtp_pass.plan.plan", "fgtp_pass.cost.report", "fgtp_pass.cli.app"]


def _imported_modules(path: Path) -> set[str]:
    """The modules of this package that a file names in an import, at its top or inside."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "fgtp_pass":
            found |= {f"fgtp_pass.{name.name}" for name in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fgtp_pass."):
            found.add(str(node.module))
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names if name.name.startswith("fgtp_pass")}
    return found


def _imports_of(room: str) -> set[str]:
    """The other rooms that the files of a room import."""
    modules = set[str]().union(*map(_imported_modules, (PACKAGE / room).glob("*.py")))
    rooms = {name.split(".")[1] for name in modules} & set(ROOMS)
    if room != "pattern" and "fgtp_pass.pattern" in modules:  # one file hands these on to authors
        rooms |= {"algebra", "detect", "graph"}
    return rooms - {room}


def _declared(room: str, what: str) -> set[str]:
    """The rooms in the line `<what>: a, b.` of a room's docstring."""
    text = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text())) or ""
    line = re.search(rf"^{what}: ([^.]*)\.$", text, re.MULTILINE)
    assert line, f"fgtp_pass/{room}/__init__.py has no line '{what}: ....'"
    named = {name.strip() for name in line[1].split(",")}
    return named - {"no other room"}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_what_it_says(room: str) -> None:
    assert _imports_of(room) == _declared(room, "May import")


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_is_imported_by_what_it_says(room: str) -> None:
    importers = {other for other in ROOMS if room in _imports_of(other)}
    assert importers == _declared(room, "May be imported by")


def test_no_import_runs_back_up() -> None:
    list(TopologicalSorter({room: _imports_of(room) for room in ROOMS}).static_order())


def test_no_two_files_share_a_name() -> None:
    names = [p.stem for room in ROOMS for p in (PACKAGE / room).glob("*.py")]
    twice = {name for name in names if names.count(name) > 1} - {"__init__"}
    assert not twice


def test_files_fit_in_a_head() -> None:
    long = {
        p.name: n for p in PACKAGE.rglob("*.py") if (n := len(p.read_text().splitlines())) > 400
    }
    assert not long


@pytest.mark.parametrize("module", NO_TORCH)
def test_what_the_command_line_needs_imports_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=HANG)

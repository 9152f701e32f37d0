"""Runs the tests with the oldest, the newest and the versions between: `make test-versions`.

    python tools/version_matrix.py                      # every row, one after the other
    python tools/version_matrix.py torch2.15.0-py3.13   # some rows; --list names them
    python tools/version_matrix.py --discard            # keeps no environment (some GB each)
    python tools/version_matrix.py --size core          # a few minutes a row, see SIZES

Each row of MATRIX gets an environment of its own in .environments/, kept for the next time. What
runs is `make test` without what depends on one version or tests no other code on another: real vLLM
engines (vLLM pins torch), the page in a browser, and the snapshots, which hold the graphs of one
torch and one transformers. A row whose Python is not on PATH is skipped and said to be.

Prints the table, writes it to .environments/results.json, and exits with status 1 if a row failed.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".environments"
NEWEST = ">=5.19,<6"


@dataclass(frozen=True)
class Row:
    """One environment; `transformers` is a version specifier."""

    torch: str
    python: str
    transformers: str

    @property
    def name(self) -> str:
        return f"torch{self.torch}-py{self.python}"


# every torch once, every Python with the oldest and the newest transformers
MATRIX = (
    Row("2.11.0", "3.11", "==5.19.0"),
    Row("2.12.1", "3.12", NEWEST),
    Row("2.13.0", "3.13", "==5.19.0"),
    Row("2.14.1", "3.11", "==5.19.0"),
    Row("2.15.0", "3.11", NEWEST),
    Row("2.15.0", "3.13", NEWEST),
)
EXTRAS = ("cli", "plot", "demo", "test")
# the row's own, and what no test here needs
LEFT_OUT = ("torch", "transformers", "fgtp-pass", "playwright", "ruff", "mypy")
FP32 = "tests/test_numerics.py::test_two_ranks_fp32"
SIZES = {
    # every architecture is detected, four compute; uneven and unequal token counts; each backend
    "core": [
        "tests/test_detection.py::test_sites_and_reasons",
        *(f"{FP32}[{name}]" for name in ("llama", "gpt2", "falcon", "deepseek_v3")),
        "tests/test_tokens.py::test_unequal_counts_are_an_error_with_each_ranks_count",
        "tests/test_tokens.py::test_ragged_batches_and_lengths[gpt2]",
        "tests/test_packing.py::test_the_op_takes_packed_and_plain_weights",
    ],
    "test": [
        "tests",
        "--ignore=tests/engine",
        "--ignore=tests/test_snapshots.py",
        "--ignore=tests/patterns",
        "-m=not full",
    ],
}


def requirements() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    listed = [*project["dependencies"], *(r for extra in EXTRAS for r in extras[extra])]
    names = {needed: re.split(r"[\s\[<>=~!;]", needed)[0] for needed in listed}
    return [needed for needed, name in names.items() if name not in LEFT_OUT]


def make(row: Row, python: str) -> Path:
    """The environment of a row, made unless it is there; its Python."""
    folder = FOLDER / row.name
    own, done = folder / "bin" / "python", folder / ".installed"
    wanted = [f"torch=={row.torch}", f"transformers{row.transformers}", *requirements()]
    if done.exists() and done.read_text() == "\n".join(wanted):
        return own
    print(f"{row.name}: installing ...", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([python, "-m", "venv", str(folder)], check=True)
    pip = [str(own), "-m", "pip", "--disable-pip-version-check", "-qq", "install"]
    subprocess.run([*pip, *wanted], check=True)
    subprocess.run([*pip, "--no-deps", "--editable", str(ROOT)], check=True)
    done.write_text("\n".join(wanted))
    return own


def run(row: Row, python: Path, size: str) -> dict[str, Any]:
    """Run the tests of a row; what came of them, and the versions that were in force."""
    report = FOLDER / f"{row.name}.xml"
    print(f"{row.name}: running the tests ...", flush=True)
    begun = time.monotonic()
    report.unlink(missing_ok=True)
    command = [str(python), "-m", "pytest", *SIZES[size], "-n=2", "--dist=loadgroup", "-q"]
    subprocess.run([*command, "-p", "no:cacheprovider", f"--junitxml={report}"], cwd=ROOT)
    found = {key: int(value) for key, value in _counts(report).items()}
    bad = found["failures"] + found["errors"]
    return {
        "status": "passed" if found["tests"] and not bad else "FAILED",
        "size": size,
        "passed": found["tests"] - found["skipped"] - bad,
        "failed": bad,
        "skipped": found["skipped"],
        "minutes": round((time.monotonic() - begun) / 60, 1),
        "transformers": _version(python, "transformers"),
        "torch": _version(python, "torch"),
    }


def attempt(row: Row, python: str, size: str) -> dict[str, Any]:
    """Make the environment and run; a row that cannot be installed fails alone."""
    try:
        return run(row, make(row, python), size)
    except subprocess.CalledProcessError as error:
        return {"status": "FAILED", "why": f"{' '.join(error.cmd[:6])} ... failed"}


def _counts(report: Path) -> dict[str, str]:
    if not report.exists():
        return dict.fromkeys(("tests", "failures", "errors", "skipped"), "0")
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    return {key: suite.attrib[key] for key in ("tests", "failures", "errors", "skipped")}


def _version(python: Path, name: str) -> str:
    code = f"from importlib.metadata import version; print(version({name!r}))"
    return subprocess.run(
        [str(python), "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


def table(results: dict[str, dict[str, Any]]) -> str:
    lines = ["| torch | Python | transformers | result |", "|---|---|---|---|"]
    for row in MATRIX:
        found = results.get(row.name, {"status": "not run"})
        said = found["status"]
        if "why" in found:
            said += f": {found['why']}"
        if "passed" in found:
            counts = (f"{found[what]} {what}" for what in ("passed", "failed", "skipped"))
            said = f"{said} ({found['size']}): {', '.join(counts)}"
        transformers = found.get("transformers", row.transformers.removeprefix("=="))
        lines.append(f"| {row.torch} | {row.python} | {transformers} | {said} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", help="names of rows; all of them if none is given")
    parser.add_argument("--list", action="store_true", help="name the rows and end")
    parser.add_argument("--discard", action="store_true", help="remove each environment after use")
    parser.add_argument("--size", choices=SIZES, default="test", help="which tests (default: test)")
    given = parser.parse_args()
    names = [row.name for row in MATRIX]
    unknown = set(given.rows) - set(names)
    if given.list or unknown:
        print(*names, sep="\n")
        sys.exit(f"unknown: {', '.join(sorted(unknown))}" if unknown else 0)
    FOLDER.mkdir(exist_ok=True)
    kept = FOLDER / "results.json"
    results = json.loads(kept.read_text()) if kept.exists() else {}
    chosen = given.rows or names
    for row in MATRIX:
        if row.name not in chosen:
            continue
        python = shutil.which(f"python{row.python}")
        if python is None:
            results[row.name] = {"status": f"skipped, no python{row.python} on PATH"}
        else:
            results[row.name] = attempt(row, python, given.size)
            if given.discard:
                shutil.rmtree(FOLDER / row.name, ignore_errors=True)
        kept.write_text(json.dumps(results, indent=2) + "\n")
    print(table(results))
    sys.exit(any(results[name]["status"] == "FAILED" for name in chosen))


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()

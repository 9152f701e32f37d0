"""The page: its parts in this folder and a report's data, put into one file."""

import json
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

from fgtp_pass.cost.report import Report
from fgtp_pass.page.figures import page_data
from fgtp_pass.page.javascript import javascript

_SCRIPTS = (
    "text.js",
    "model.js",
    "compare.js",
    "commands.js",
    "controls.js",
    "charts.js",
    "diagram.js",
    "page.js",
)


def write_page(report: Report, path: Path) -> None:
    """Write the page of a report; it needs nothing but the file. Raises OSError."""
    path.write_text(render(report), encoding="utf-8")


def render(report: Report) -> str:
    """The HTML of the page."""
    folder = files("fgtp_pass.page")
    read = {name: (folder / name).read_text(encoding="utf-8") for name in _SCRIPTS}
    # "<" ends no script that it is escaped in
    data = json.dumps(page_data(report)).replace("<", "\\u003c")
    parts = {
        "title": escape(f"{report.summary.name} on {report.hardware.title}"),
        "style": (folder / "page.css").read_text(encoding="utf-8"),
        "script": "\n".join([f"const DATA = {data};", javascript(), *read.values()]),
    }
    return Template((folder / "page.html").read_text(encoding="utf-8")).substitute(parts)

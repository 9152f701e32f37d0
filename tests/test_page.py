"""The page opens and responds, in a browser; and the plot."""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ranks import HANG

from fgtp_pass.cost.hardware import load
from fgtp_pass.cost.layout import Deployment, Load
from fgtp_pass.cost.model_summary import ModelSummary
from fgtp_pass.cost.quantization import SCHEMES
from fgtp_pass.cost.report import Report, make_report
from fgtp_pass.cost.spelling import read_sizes
from fgtp_pass.page.render import render, write_page

pytestmark = pytest.mark.xdist_group("page")  # one browser, one report

ROOT = Path(__file__).parents[1]
ARTIFACTS = ROOT / "test-artifacts"


@pytest.fixture(scope="module")
def report(summary_of: Callable[[str], ModelSummary]) -> Report:
    """vLLM-Ascend's published case: every component in groups of 8."""
    model = summary_of("deepseek-ai/DeepSeek-R1")
    deployment = Deployment(
        model, load("ascend-910b-a2"), Load(32 * 24, 4096, scheme=SCHEMES["w8a8"]), 8
    )
    return make_report(deployment, 32, asked=read_sizes("8", model.keys))


# the page in a browser --------------------------------------------------------------------------


@pytest.fixture
def opened(chromium: Any, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Opens a report's page; in the end it must have said and asked for nothing else."""
    pages, said, asked = [], [], []

    def open_it(report: Report, hash_: str = "", width: int = 1280, **keywords: Any) -> Any:
        path = tmp_path / "report.html"
        write_page(report, path)
        page = chromium.new_page(viewport={"width": width, "height": 800}, **keywords)
        page.set_default_timeout(1000 * HANG)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri() + hash_)
        pages.append(page)
        return page

    yield open_it
    for page in pages:
        page.close()
    assert said == []
    assert {url for url in asked if not url.startswith(("file:", "data:"))} == set()


def names(page: Any) -> list[str]:
    """The layouts' names, those in the closed list of what does not fit too."""
    found = page.locator(".layout .name label").evaluate_all(
        "labels => labels.map((label) => label.firstChild.textContent)"
    )
    return [str(name) for name in found]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_says_what_matters_first_on_any_screen(
    opened: Callable[..., Any], report: Report, scheme: str, width: int
) -> None:
    page = opened(report, width=width, color_scheme=scheme)
    best = report.comparison.best
    headline = page.locator("h1").inner_text()
    assert headline.startswith(f"{best.name} wins: {1e3 * best.tpot.mid:.1f} ms")
    assert page.title() == f"deepseek-ai/DeepSeek-R1: {headline}"
    assert names(page) == [option.name for option in report.comparison.options]
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    # every text can be read, whatever it is drawn in, and no table leaves the screen
    small = page.evaluate(
        """[...document.querySelectorAll("body *")].filter((e) => {
          const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
          const box = e.getBoundingClientRect();
          if (!own || !box.width || e.closest("option, script, title")) return false;
          const svg = e.closest("svg");
          const scale = svg ? svg.getBoundingClientRect().width / svg.viewBox.baseVal.width : 1;
          const size = parseFloat(getComputedStyle(e).fontSize) * scale;
          return size < 10.5 || box.right > innerWidth + 1;
        }).map((e) => e.outerHTML.slice(0, 80))"""
    )
    assert small == []
    ARTIFACTS.mkdir(exist_ok=True)
    page.screenshot(path=ARTIFACTS / f"page-{width}-{scheme}.png", full_page=True)


def test_it_prints_light_and_without_controls(opened: Callable[..., Any], report: Report) -> None:
    page = opened(report, color_scheme="dark")
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert not page.locator("#controls").is_visible()
    assert "Sequences in flight: 768" in page.locator("#inputs").inner_text()
    ground = page.evaluate("getComputedStyle(document.querySelector('section')).backgroundColor")
    assert ground == "rgb(255, 255, 255)"
    ARTIFACTS.mkdir(exist_ok=True)
    page.pdf(path=ARTIFACTS / "page.pdf", format="A4")
    page.set_viewport_size({"width": 794, "height": 1123})  # A4
    page.screenshot(path=ARTIFACTS / "page-print.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_its_state_is_in_its_url(opened: Callable[..., Any], report: Report) -> None:
    page = opened(report)
    first = page.locator("h1").inner_text()
    page.locator("#sequences").fill("320")
    page.locator("#sequences").press("Tab")
    page.locator("#hardware").select_option("h200")
    assert page.locator("h1").inner_text() != first
    changed = page.locator("h1").inner_text()
    url = page.url
    assert "sequences=320" in url
    assert "hardware=h200" in url
    again = opened(report, hash_=url[url.index("#") :])
    assert again.locator("h1").inner_text() == changed
    assert again.locator("#sequences").input_value() == "320"
    again.locator("#reset").click()
    assert again.locator("h1").inner_text() == first
    assert again.url.endswith("#")


@pytest.mark.parametrize(
    "hash_",
    ["#hardware=tpu&devices=-3&sequences=many", "#sizes=none:8,oproj:x", "#layout=none", "#%%%"],
)
def test_a_url_that_nobody_understands_opens_as_planned(
    opened: Callable[..., Any], report: Report, hash_: str
) -> None:
    plain = opened(report).locator("h1").inner_text()
    assert opened(report, hash_=hash_).locator("h1").inner_text() in (plain,)


def test_numbers_that_cannot_be_change_nothing(opened: Callable[..., Any], report: Report) -> None:
    page = opened(report)
    first = page.locator("h1").inner_text()
    page.locator("#devices").fill("0")
    page.locator("#devices").press("Tab")
    assert page.locator("#devices").get_attribute("aria-invalid") == "true"
    assert page.locator("h1").inner_text() == first


def test_every_input_changes_the_figures(opened: Callable[..., Any], report: Report) -> None:
    page = opened(report)

    def figures() -> str:
        return str(page.locator("#layouts").inner_text() + page.locator("#table").inner_text())

    before = figures()
    for name, value in (
        ("devices", "64"),
        ("node", "4"),
        ("sequences", "99"),
        ("input", "9000"),
        ("output", "2000"),
        ("latency", "3"),
        ("target", "70"),
    ):
        page.locator(f"#{name}").fill(value)
        page.locator(f"#{name}").press("Tab")
        after = figures()
        assert after != before, name
        before = after
    for name, value in (
        ("network", "ethernet 25"),
        ("weights", "none"),
        ("kv", "fp8"),
        ("hardware", "b200"),
    ):
        page.locator(f"#{name}").select_option(value)
        after = figures()
        assert after != before, name
        before = after
    page.locator("#mtp").check()
    assert figures() != before


def test_a_layout_is_chosen_by_keyboard(opened: Callable[..., Any], report: Report) -> None:
    page = opened(report)
    page.locator("#layouts input:checked").focus()
    page.keyboard.press("ArrowDown")
    second = report.comparison.options[1].name
    assert page.locator("#layout-title").inner_text().startswith(second)
    assert "layout=" in page.url
    served = page.locator("#command").inner_text()
    assert served.startswith("vllm serve deepseek-ai/DeepSeek-R1")
    page.locator("#copy").click()
    page.get_by_text(re.compile("^(Copied|Selected)$")).wait_for()
    assert page.evaluate("getSelection().toString()") == served


def test_values_are_shown_where_one_points(opened: Callable[..., Any], report: Report) -> None:
    page = opened(report)
    legend = page.locator("#legend")
    at_load = legend.inner_text()
    chart = page.locator("#tpot svg")
    chart.hover(position={"x": 200, "y": 150})
    assert legend.inner_text() != at_load
    page.mouse.move(0, 0)
    chart.focus()
    page.keyboard.press("ArrowRight")
    assert legend.inner_text() != at_load
    assert "30 tokens per rank" in chart.get_attribute("aria-label")


def test_it_shows_the_components(opened: Callable[..., Any], report: Report) -> None:
    page = opened(report)
    page.locator(".layout .name label", has_text=report.fine_grained.name).first.click()
    cells = [
        [text.strip() for text in row.locator("td").all_inner_texts()]
        for row in page.locator("#table tbody tr").all()
    ]
    assert [row[0] for row in cells] == list(report.shapes)
    row = {known.component: known for known in report.rows}["oproj"]
    oproj = cells[[one[0] for one in cells].index("oproj")]
    assert oproj[1] == "61"
    assert oproj[3:7] == ["6.67 GiB", "5.84 GiB", "180.1 MiB", "122"]
    assert f"{row.tpot_change_ms:+.2f}" in oproj[7].replace("\u2212", "-")
    assert page.locator("#diagram svg").count() == len(report.shapes)
    drawn = page.locator("#diagram svg").nth(list(report.shapes).index("oproj"))
    assert "o_proj 7168 \u00d7 16384 \u2192 7168 \u00d7 2048" in drawn.inner_html()
    sources = page.locator("#constants tbody tr td:last-child").all_inner_texts()
    assert len(sources) == len(report.hardware.constants())
    assert all(len(source) > 10 for source in sources)
    page.get_by_label("group size of oproj").select_option("2")
    assert "sizes=" in page.url
    assert "oproj 2" in page.locator("#layouts").inner_text()


@pytest.mark.parametrize(
    ("model", "devices", "per_node"), [("phi3", 6, 4), ("gpt2", 8, 8), ("llama", 1, 8)]
)
def test_it_opens_for_other_models(
    opened: Callable[..., Any],
    summary_of: Callable[[str], ModelSummary],
    model: str,
    devices: int,
    per_node: int,
) -> None:
    """Fused projections, tied weights, one device only; with every layout chosen in turn."""
    deployment = Deployment(summary_of(model), load("h200"), Load(5000 * devices, 128), per_node)
    page = opened(make_report(deployment, devices))
    for i in range(page.locator("#layouts input").count()):
        page.locator(f"#layout-{i}").evaluate("input => input.click()")
        assert "NaN" not in page.content()
        assert "undefined" not in page.locator("body").inner_text()


def test_names_are_text(opened: Callable[..., Any], report: Report) -> None:
    name = "</script><script>console.log('run')</script><b>$title"
    odd = report.summary.model_copy(update={"name": name})
    page = opened(replace(report, deployment=replace(report.deployment, summary=odd)))
    assert name in page.locator("#subject").inner_text()
    assert page.title().startswith(name)


def test_it_reads_well_in_both_schemes() -> None:
    """Contrast by WCAG: 4.5 for text, 3 for what is drawn."""
    css = (ROOT / "fgtp_pass/page/page.css").read_text()
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block))
        for block in re.findall(r":root \{(.*?)\}", css, re.DOTALL)[:2]
    )
    assert set(light) == set(dark)
    for colors in (light, dark):
        for ground in ("page", "card"):
            for name in ("text", "muted", "accent", "good", "bad"):
                assert contrast(colors[name], colors[ground]) >= 4.5, name
        for name in (name for name in colors if re.fullmatch(r"c\d", name)):
            assert contrast(colors[name], colors["card"]) >= 3, name


def contrast(one: str, other: str) -> float:
    def luminance(color: str) -> float:
        parts = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_it_is_one_file(report: Report) -> None:
    page = render(report)
    assert not re.search(r"<(link|script|img)[^>]+(src|href)=\"(?!data:)", page)
    assert "@import" not in page
    assert len(page) < 400_000


# the plot ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["8", "1"])
def test_the_plot(report: Report, size: str) -> None:
    plot = pytest.importorskip("fgtp_pass.page.plot", reason="pip install '.[plot]'")
    asked = read_sizes(size, report.summary.keys)
    made = make_report(report.deployment, 32, asked=asked)
    ARTIFACTS.mkdir(exist_ok=True)
    path = ARTIFACTS / f"plot-{size}.png"
    plot.write_plot(made, path)
    header = path.read_bytes()[:24]
    assert header.startswith(b"\x89PNG")
    assert int.from_bytes(header[16:20], "big") == 1800

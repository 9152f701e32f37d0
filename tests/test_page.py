"""The page and the plot: in JavaScript the same figures as in Python, and it opens and responds."""

import json
import random
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zoo

from fgtp_pass.cost.advice import choose_sizes
from fgtp_pass.cost.estimate import Cluster, estimate
from fgtp_pass.cost.formulas import evaluate
from fgtp_pass.cost.hardware import load, profiles
from fgtp_pass.cost.memory import Load, rank_memory
from fgtp_pass.cost.report import Report, make_report
from fgtp_pass.cost.spelling import read_sizes
from fgtp_pass.models import summarize
from fgtp_pass.page.data import page_data
from fgtp_pass.page.javascript import EXPRESSIONS, javascript
from fgtp_pass.page.render import render, write_page
from fgtp_pass.summary import ModelSummary

ROOT = Path(__file__).parents[1]
ARTIFACTS = ROOT / "test-artifacts"
Run = Callable[[str], Any]


@pytest.fixture(scope="module")
def summary(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ModelSummary]:
    """The summary of a shipped model, or of a tiny one of the zoo."""
    folder = tmp_path_factory.mktemp("page")

    def make(name: str) -> ModelSummary:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FGTP_CACHE_DIR", str(folder))
            if "/" in name:
                return summarize(name)
            path = folder / f"{name}.json"
            path.write_text(json.dumps(zoo.config(name).to_dict() | {"dtype": "bfloat16"}))
            return summarize(str(path))

    return make


@pytest.fixture(scope="module")
def report(summary: Callable[[str], ModelSummary]) -> Report:
    """vLLM-Ascend's published case: every component in groups of 8."""
    model = summary("deepseek-ai/DeepSeek-R1")
    return make_report(
        model,
        load("ascend-910b-a2"),
        Load(batch=24, context=4096, quantization="w8a8"),
        data_parallel_size=32,
        ranks_per_node=8,
        asked=read_sizes("8", model.keys),
    )


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A headless Chromium; the test is skipped where there is none."""
    pytest.importorskip("playwright", reason="playwright is missing: pip install playwright")
    import browser
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = browser.launch(playwright)
        if found is None:
            pytest.skip(browser.MISSING)
        yield found
        found.close()


@pytest.fixture(params=["node", "chromium"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Run:
    """Runs the body of a JavaScript function, and gives what it returns."""
    if request.param == "node" and shutil.which("node") is None:
        pytest.skip("no node: `apt-get install nodejs`; Chromium runs the same test")
    page = request.getfixturevalue("chromium").new_page() if request.param == "chromium" else None

    def run_it(body: str) -> Any:
        source = f"JSON.stringify((() => {{ {body} }})())"
        if page is not None:
            return json.loads(page.evaluate(source))
        path = tmp_path / "body.js"
        path.write_text(f"process.stdout.write({source})")
        done = subprocess.run(["node", path], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run_it


# JavaScript against Python ----------------------------------------------------------------------


def random_values(draw: random.Random) -> dict[str, float]:
    """A number for every symbol, of a size that it may have."""
    symbols = {symbol for e in EXPRESSIONS.values() for symbol in e.free_symbols}
    values: dict[str, float] = {}
    for name in sorted(map(str, symbols)):
        if name in ("group", "ranks_per_node"):
            values[name] = draw.choice([1, 2, 3, 4, 6, 8, 16, 32])
        elif name == "tokens":
            values[name] = draw.choice([0, 1, 24, 1000, 100_000])
        elif name == "overlap":
            values[name] = draw.choice([0, 1, draw.random()])
        elif name.endswith("_bandwidth") or name == "matmul_rate":
            values[name] = 10 ** draw.uniform(8, 16)
        elif name.endswith(("_base", "_peer")):
            values[name] = draw.choice([0, 10 ** draw.uniform(-7, -3)])
        elif name.endswith("_count"):
            values[name] = draw.choice([0, 1, 122])
        else:
            values[name] = draw.choice([0, 10 ** draw.uniform(0, 10)])
    return values


def test_javascript_is_python(run: Run) -> None:
    draw = random.Random(4)
    given = [random_values(draw) for _ in range(500)]
    body = (
        f"{javascript()} return {json.dumps(given)}.map((values) => "
        "Object.fromEntries(Object.entries(FORMULAS).map(([name, f]) => [name, f(values)])));"
    )
    for values, found in zip(given, run(body), strict=True):
        python = {
            name: evaluate(e, {symbol: values[str(symbol)] for symbol in e.free_symbols})
            for name, e in EXPRESSIONS.items()
        }
        # a change is the difference of much larger numbers
        slack = 1e-12 * (python["wholeSeconds"] + python["shardedSeconds"])
        assert found == pytest.approx(python, rel=1e-12, abs=slack)
    assert set(found) == set(EXPRESSIONS)


def test_the_page_computes_the_planners_rows(run: Run, report: Report) -> None:
    draw = random.Random(5)
    data = page_data(report)
    cases = [
        {
            "tokens": draw.choice(data["token_stops"]),
            "device": draw.choice(list(profiles())),
            "sizes": {name: draw.choice([1, 2, 8, 16, 32]) for name in report.shapes},
        }
        for _ in range(40)
    ]
    model = (ROOT / "fgtp_pass/page/model.js").read_text()
    body = f"""const DATA = {json.dumps(data)}; {javascript()} {model}
    return {json.dumps(cases)}.map((given) => {{
      const device = DATA.devices.find(({{ name }}) => name === given.device);
      const state = {{ ...given, device }};
      const rows = rowsOf(state).map((row) => ({{ ...row,
        lastPaying: row.lastPaying === Infinity ? "always" : row.lastPaying }}));
      return {{ rows, memory: memoryOf(state), recommended: recommendedIn(state) }};
    }});"""
    for case, found in zip(cases, run(body), strict=True):
        device, tokens, sizes = load(case["device"]), case["tokens"], case["sizes"]
        cluster = Cluster(device, 32, 8)
        for row, expected in zip(
            found["rows"], estimate(report.shapes, cluster, sizes, tokens), strict=True
        ):
            assert row["component"]["name"] == expected.component
            assert row["saved"] == pytest.approx(expected.bytes_saved_per_rank)
            assert row["moved"] == pytest.approx(expected.bytes_moved_per_step, abs=1)
            assert row["messages"] == expected.messages_per_step
            assert row["change"] == pytest.approx(expected.tpot_change_ms, abs=1e-4)
            pays = expected.pays_at_tokens_per_rank
            assert row["lastPaying"] == (0 if pays is None else pays[1] or "always")
        load_ = Load(tokens, report.load.context, report.load.quantization)
        for key, applied in (("whole", {}), ("kept", sizes)):
            memory = rank_memory(report.summary, load_, device, 32, applied)
            assert found["memory"][key] == pytest.approx(memory.weight_bytes)
            assert found["memory"]["kv"] == pytest.approx(memory.kv_bytes)
            assert found["memory"]["usable"] == memory.usable_bytes
        choice = choose_sizes(report.shapes, cluster, tokens, report.objective)
        assert found["recommended"] == {"sizes": choice.sizes, "reasons": choice.reasons}


# the page in a browser --------------------------------------------------------------------------


@pytest.fixture
def opened(chromium: Any, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Opens a report's page; in the end it must have said and asked for nothing else."""
    pages, said, asked = [], [], []

    def open_it(report: Report, **keywords: Any) -> Any:
        path = tmp_path / "report.html"
        write_page(report, path)
        page = chromium.new_page(viewport={"width": 1366, "height": 768}, **keywords)
        page.set_default_timeout(20_000)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        pages.append(page)
        return page

    yield open_it
    for page in pages:
        page.close()
    assert said == []
    assert {url for url in asked if not url.startswith(("file:", "data:"))} == set()


def figures(page: Any) -> list[str]:
    return page.locator("#figures b").all_inner_texts()


def move(page: Any, slider: str, key: str) -> None:
    page.locator(f"#{slider}").focus()
    page.keyboard.press(key)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_opens_and_says_what_matters_first(
    opened: Callable[..., Any], report: Report, scheme: str
) -> None:
    page = opened(report, color_scheme=scheme)
    headline = page.locator("h1").inner_text()
    assert headline.startswith("Frees 9.83 GiB on every rank; an output token takes 1.29 ms less")
    assert page.title() == f"deepseek-ai/DeepSeek-R1: {headline}"
    saved, change, fits, recommended = figures(page)
    assert saved == "9.83 GiB"
    assert change == "\u22121.29 ms"  # a true minus
    assert fits.endswith("fits")
    assert recommended == "embedding off, oproj off, mlp 8, lmhead 8"
    for id_ in ("figures", "controls"):  # on the first screen
        box = page.locator(f"#{id_}").bounding_box()
        assert box["y"] + box["height"] < 768
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    ARTIFACTS.mkdir(exist_ok=True)
    page.screenshot(path=ARTIFACTS / f"page-{scheme}-first-screen.png")
    page.screenshot(path=ARTIFACTS / f"page-{scheme}.png", full_page=True)


def test_it_shows_the_tables_figures(opened: Callable[..., Any], report: Report) -> None:
    page = opened(report)
    cells = [
        [text.strip() for text in row.locator("td").all_inner_texts()]
        for row in page.locator("#table tbody tr").all()
    ]
    assert [row[0] for row in cells] == ["embedding", "oproj", "mlp", "lmhead"]
    assert cells[1][1:] == [
        *("61", "8", "6.67 GiB", "5.84 GiB", "180.1 MiB", "122", "+0.28 ms", "1 to 19"),
    ]
    assert page.locator("#tpot circle.crossover").count() == 4  # three components and the total
    assert page.locator("#command").inner_text() == report.command
    page.locator("#copy").click()
    page.get_by_text(re.compile("^(Copied|Selected)$")).wait_for()
    assert page.evaluate("getSelection().toString()") == report.command
    lanes = page.locator("#diagram svg")
    assert lanes.count() == 4
    assert "o_proj 7168 \u00d7 16384 \u2192 7168 \u00d7 2048" in lanes.nth(1).inner_html()
    sources = page.locator("#constants tbody tr td:last-child").all_inner_texts()
    assert len(sources) == len(report.cluster.hardware.constants())
    assert all(len(source) > 10 for source in sources)


def test_sliders_change_the_figures(opened: Callable[..., Any], report: Report) -> None:
    page = opened(report)
    first = figures(page)
    chart = page.locator("#tpot").inner_html()
    move(page, "tokens", "ArrowRight")
    more = figures(page)
    assert page.locator("#tokens").get_attribute("aria-valuetext") == "32 tokens"
    assert more[0] == first[0]
    assert more[1] != first[1]
    assert "at 32 tokens per rank" in page.locator("h1").inner_text()
    assert page.locator("#tpot").inner_html() != chart
    move(page, "tokens", "ArrowLeft")
    assert figures(page) == first
    move(page, "group", "ArrowRight")
    assert page.locator("#group-value").inner_text() == "recommended: mlp 8, lmhead 8"
    assert figures(page)[:2] == ["2.48 GiB", "\u22121.65 ms"]
    assert "oproj" not in page.locator("#command").inner_text()
    move(page, "group", "ArrowRight")
    assert "Nothing is sharded" in page.locator("h1").inner_text()
    move(page, "group", "Home")
    move(page, "hardware", "End")
    fastest = max(map(load, profiles()), key=lambda one: one.memory_bandwidth.value)
    assert page.locator("#hardware-value").inner_text() == fastest.name
    assert fastest.title in page.locator("#constants-title").inner_text()
    assert figures(page)[0] == first[0]
    assert figures(page)[1] != first[1]


@pytest.mark.parametrize(
    ("model", "ranks", "per_node"), [("phi3", 6, 4), ("gpt2", 8, 8), ("llama", 1, 8)]
)
def test_it_opens_for_other_models_at_every_stop(
    opened: Callable[..., Any],
    summary: Callable[[str], ModelSummary],
    model: str,
    ranks: int,
    per_node: int,
) -> None:
    """Fused projections, tied weights, one rank only; at every stop of the group slider."""
    made = make_report(
        summary(model),
        load("h200"),
        Load(5000, 128),
        data_parallel_size=ranks,
        ranks_per_node=per_node,
    )
    page = opened(made)
    for _ in range(int(page.locator("#group").get_attribute("max")) + 1):
        assert "NaN" not in page.content()
        assert "undefined" not in page.locator("body").inner_text()
        assert page.locator("#command").inner_text().startswith("vllm serve")
        move(page, "group", "ArrowRight")


def test_names_are_text(opened: Callable[..., Any], report: Report) -> None:
    name = "</script><script>console.log('run')</script><b>$title"
    odd = report.summary.model_copy(update={"name": name})
    page = opened(Report(**{**vars(report), "summary": odd}))
    assert name in page.locator("#subject").inner_text()
    assert page.title().startswith(name)


def test_it_reads_well_in_both_schemes() -> None:
    """Contrast by WCAG: 4.5 for text, 3 for what is drawn."""
    css = (ROOT / "fgtp_pass/page/page.css").read_text()
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block))
        for block in re.findall(r":root \{(.*?)\}", css, re.DOTALL)
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
    plot = pytest.importorskip("fgtp_pass.page.plot", reason="pip install 'fgtp-pass[plot]'")
    made = make_report(
        report.summary,
        report.cluster.hardware,
        report.load,
        data_parallel_size=32,
        ranks_per_node=8,
        asked=read_sizes(size, report.summary.keys),
    )
    ARTIFACTS.mkdir(exist_ok=True)
    path = ARTIFACTS / f"plot-{size}.png"
    plot.write_plot(made, path)
    header = path.read_bytes()[:24]
    assert header.startswith(b"\x89PNG")
    assert int.from_bytes(header[16:20], "big") == 1800

"""In JavaScript the page has the same figures, in the same order, as the planner in Python."""

import json
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ranks import HANG

from fgtp_pass.cost import commands
from fgtp_pass.cost.compare import compare
from fgtp_pass.cost.estimate import estimate
from fgtp_pass.cost.formulas import evaluate
from fgtp_pass.cost.hardware import load, profiles
from fgtp_pass.cost.layout import Deployment, Load
from fgtp_pass.cost.model_summary import ModelSummary
from fgtp_pass.cost.quantization import SCHEMES
from fgtp_pass.cost.report import make_report
from fgtp_pass.page.figures import page_data
from fgtp_pass.page.javascript import EXPRESSIONS, javascript

pytestmark = pytest.mark.xdist_group("page")  # one browser, one report

ROOT = Path(__file__).parents[1]
Run = Callable[[str], Any]


@pytest.fixture
def run_anywhere(request: pytest.FixtureRequest, tmp_path: Path) -> Run:
    """`run` in node, or where there is none in Chromium."""
    request.param = "node" if shutil.which("node") else "chromium"
    return _runner(request, tmp_path)


@pytest.fixture(params=["node", "chromium"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Run:
    """Runs the body of a JavaScript function, and gives what it returns."""
    return _runner(request, tmp_path)


def _runner(request: pytest.FixtureRequest, tmp_path: Path) -> Run:
    if request.param == "node" and shutil.which("node") is None:
        pytest.skip("no node: `apt-get install nodejs`; Chromium runs the same test")
    page = request.getfixturevalue("chromium").new_page() if request.param == "chromium" else None

    def run_it(body: str) -> Any:
        source = f"JSON.stringify((() => {{ {body} }})())"
        if page is not None:
            return json.loads(page.evaluate(source))
        path = tmp_path / "body.js"
        path.write_text(f"process.stdout.write({source})")
        done = subprocess.run(["node", path], capture_output=True, text=True, timeout=HANG)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run_it


def random_values(draw: random.Random) -> dict[str, float]:
    """A number for every symbol, of a size that it may have."""
    symbols = {symbol for e in EXPRESSIONS.values() for symbol in e.free_symbols}
    values: dict[str, float] = {}
    for name in sorted(map(str, symbols)):
        if name in ("group", "ranks_per_node", "tensor_parallel", "devices_per_node", "kv_heads"):
            values[name] = draw.choice([1, 2, 3, 4, 6, 8, 16, 32])
        elif name in ("tokens", "sequences", "context"):
            values[name] = draw.choice([1, 24, 1000, 100_000])
        elif name in ("overlap", "prefills"):
            values[name] = draw.choice([0, 1])
        elif name.endswith("_bandwidth") or name == "matmul_rate":
            values[name] = 10 ** draw.uniform(8, 16)
        elif name.endswith(("_base", "_peer", "_seconds")):
            values[name] = draw.choice([0, 10 ** draw.uniform(-7, -3)])
        elif name.endswith(("_count", "_layers")) or name in ("layers", "matmuls"):
            values[name] = draw.choice([0, 1, 122])
        elif name == "imbalance":
            values[name] = draw.uniform(1, 3)
        else:
            values[name] = draw.choice([0, 10 ** draw.uniform(0, 10)])
    values["experts"] = draw.choice([8, 256])
    values["active"] = draw.choice([1, 8])
    values["expert_devices"] = values["tensor_parallel"] * draw.choice([1, 2, 8])
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
        slack = 1e-12 * (2 * python["computingSeconds"] + python["collectivesSeconds"])
        assert found == pytest.approx(python, rel=1e-12, abs=slack)
    assert set(found) == set(EXPRESSIONS)


def scripts(data: dict[str, Any], *names: str) -> str:
    folder = ROOT / "fgtp_pass/page"
    parts = [(folder / f"{name}.js").read_text() for name in names]
    return "\n".join([f"const DATA = {json.dumps(data)};", javascript(), *parts])


def random_states(start: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """States of the controls, with and without a target, sizes and multi-token prediction."""
    draw = random.Random(5)
    return [
        {
            **start,
            "hardware": draw.choice(list(profiles())),
            "devices": draw.choice([1, 6, 8, 16, 32]),
            "node": draw.choice([4, 8]),
            "sequences": draw.choice([8, 100, 777, 4000]),
            "input": draw.choice([500, 4096, 30_000]),
            "output": draw.choice([0, 1000]),
            "weights": draw.choice(["none", "fp8", "w4a16"]),
            "kv": draw.choice(["auto", "fp8"]),
            "mtp": draw.choice([True, False]),
            "objective": draw.choice(["balanced", "latency", "memory"]),
            "target": draw.choice([0, 40, 80]),
            "sizes": draw.choice([{}, {}, {"mlp": 2, "oproj": 1, "lmhead": 1, "embedding": 1}]),
        }
        for _ in range(count)
    ]


@pytest.mark.parametrize("model", ["deepseek-ai/DeepSeek-R1", "falcon"])
def test_the_page_compares_as_the_planner_does(
    run_anywhere: Run, summary_of: Callable[[str], ModelSummary], model: str
) -> None:
    """Layouts in order with sizes, times, memory, commands, and the rows of components."""
    known = summary_of(model)
    made = make_report(Deployment(known, load("h200"), Load(64, 4096), 8), 8)
    data = page_data(made)
    states = random_states({**data["start"], "shown": ""}, 6)
    if model == "falcon":
        for state in states:
            state["mtp"], state["sizes"] = False, {}
    body = f"""{scripts(data, "text", "model", "compare", "commands")}
    return {json.dumps(states)}.map((state) => compareLayouts(state).map((option) => ({{
      name: option.name, fits: option.fits, meets: option.meets, sequences: option.sequences,
      tpot: option.tpot, throughput: option.throughput, most: option.most, parts: option.parts,
      weights: Object.fromEntries(option.weights.map((part) => [part.name, part.kept])),
      prefill: prefillSeconds(state, option.layout), sizes: option.layout.sizes,
      command: commandOf(state, option).text,
      rows: DATA.components.map((component) => {{
        const size = option.layout.sizes[component.name] || 1;
        const change = (t) => changeSeconds(state, component, option.layout, size, t);
        return {{ change: change(24), saved: savedBytes(state, component, size),
                  pays: size > 1 ? lastPaying(change) : 0 }};
      }}),
    }})));"""
    for state, found in zip(states, run_anywhere(body), strict=True):
        scheme = SCHEMES.get(state["weights"])
        cache = None if state["kv"] == "auto" else state["kv"]
        asked_for = Load(
            state["sequences"], state["input"], state["output"], scheme, cache, state["mtp"]
        )
        deployment = Deployment(known, load(state["hardware"]), asked_for, state["node"])
        target = state["target"] / 1e3 or None
        comparison = compare(
            deployment, state["devices"], state["objective"], target, state["sizes"] or None
        )
        assert [one["name"] for one in found] == [one.name for one in comparison.options]
        for one, option in zip(found, comparison.options, strict=True):
            assert (one["fits"], one["most"]) == (option.fits, option.most)
            assert one["sequences"] == option.sequences
            assert one["meets"] == option.meets_target
            assert {k: v for k, v in one["sizes"].items() if v > 1} == {
                k: v for k, v in option.layout.sizes.items() if v > 1
            }
            tpot = option.tpot
            want = {"low": tpot.low, "mid": tpot.mid, "high": tpot.high}
            assert one["tpot"] == pytest.approx(want)
            assert one["parts"] == pytest.approx(dict(option.parts))
            assert one["weights"] == pytest.approx(dict(option.weights))
            assert one["prefill"] == pytest.approx(option.prefill)
            assert one["throughput"] == pytest.approx(option.throughput)
            served = commands.serve_command(deployment, option.layout, option.sequences)
            assert one["command"] == served.text
            cluster = deployment.cluster(option.layout)
            rows = estimate(deployment.shapes, cluster, option.layout.sizes, 24)
            for row, expected in zip(one["rows"], rows, strict=True):
                assert 1e3 * row["change"] == pytest.approx(expected.tpot_change_ms, abs=1e-4)
                saved = row["saved"] / option.layout.tensor_parallel_size
                assert saved == pytest.approx(expected.bytes_saved_per_rank, abs=1)
                pays = expected.pays_at_tokens_per_rank
                assert row["pays"] == (0 if pays is None else pays[1])

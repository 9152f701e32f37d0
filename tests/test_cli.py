"""The command line: what it prints, and that what a user gets wrong is one sentence."""

import csv
import io
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import zoo
from ranks import HANG

from fgtp_pass import ConfigError, cli
from fgtp_pass.cost.hardware import Hardware, load, profiles
from fgtp_pass.models.config_json import read_config

LAYERS = 3  # the first with a dense FFN, the others with experts


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FGTP_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "cli-cache"))
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "config.json"
    given = zoo.config("deepseek_v3", num_hidden_layers=LAYERS).to_dict()
    path.write_text(json.dumps(given | {"dtype": "float32"}))
    return str(path)


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Status, stdout and stderr of `fgtp *words`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["fgtp", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    code = ended.value.code
    if isinstance(code, str):  # what Python prints before it ends with status 1
        return 1, capsys.readouterr().out, code
    out, err = capsys.readouterr()
    return int(code or 0), out, err


def test_plan_prints_layouts_components_and_last_the_command(
    capsys: pytest.CaptureFixture[str], config: str
) -> None:
    status, out, _ = run(capsys, "plan", config, "--hardware", "h200", "--sizes", "8")
    assert status == 0
    for word in ("TP4 x 2 replicas", "wins:", "embedding", "oproj", "mlp", "lmhead", "total"):
        assert word in out
    assert "Memory of a data-parallel rank" in out
    last = out.rstrip().splitlines()[-1]
    folder = str(Path(config).parent)
    assert last.startswith(f"vllm serve {folder} --data-parallel-size 8 --enable-expert-parallel")
    assert '"oproj_tensor_parallel_size": 8' in last
    assert "attention: data parallel" in out


def test_plan_is_readable_at_80_columns(
    capsys: pytest.CaptureFixture[str], config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Into a pipe too, where nobody says how wide it is: no cell is cut off, no line wraps."""
    monkeypatch.setenv("COLUMNS", "80")
    words = ("plan", config, "--hardware", "ascend-910b-a2", "--devices", "32", "--sensitivity")
    status, out, _ = run(capsys, *words)
    assert status == 0
    assert "\u2026" not in out
    table = out[out.index("layout ") : out.index("TPOT with its range")]
    assert all(len(line) <= 80 for line in table.splitlines())
    assert "TP2 x DP16 + EP" in table
    assert "What decides the range of" in out


@pytest.mark.parametrize("form", ["markdown", "csv"])
def test_plan_in_other_formats(capsys: pytest.CaptureFixture[str], config: str, form: str) -> None:
    words = ("plan", config, "--hardware", "h200")
    status, out, _ = run(capsys, *words, "--format", form)
    assert status == 0
    layouts = json.loads(run(capsys, *words, "--json")[1])["layouts"]
    if form == "csv":
        rows = list(csv.DictReader(io.StringIO(out)))
        assert [row["name"] for row in rows] == [layout["name"] for layout in layouts]
        for row, layout in zip(rows, layouts, strict=True):
            assert float(row["tpot_ms"]) == layout["tpot_ms"][1]
            assert row["command"] == layout["command"]
    else:
        for layout in layouts:
            assert f"| {layout['name']} |" in out
        cells = {line.count("|") for line in out.splitlines() if line.startswith("| TP")}
        assert cells == {7}


def test_plan_writes_a_page_and_a_plot(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, config: str
) -> None:
    page, plot = tmp_path / "report.html", tmp_path / "report.png"
    words = ("plan", config, "--hardware", "h200", "--html", str(page), "--png", str(plot))
    status, out, err = run(capsys, *words)
    assert status == 0
    assert page.read_text().startswith("<!doctype html>")
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert f"written to {page}" in err
    assert out.rstrip().splitlines()[-1].startswith("vllm serve")


def test_plan_as_json(capsys: pytest.CaptureFixture[str], config: str) -> None:
    words = ("plan", config, "--hardware", "h200", "--json", "--objective", "memory")
    status, out, _ = run(capsys, *words, "--auto", "--data-parallel-size", "4")
    assert status == 0
    report: dict[str, Any] = json.loads(out)
    assert set(report) == {"inputs", "layouts", "components", "totals", "recommended"}
    assert report["inputs"]["devices"] == 4
    assert report["inputs"]["sequences"] == 4 * 8
    for layout in report["layouts"]:
        low, mid, high = layout["tpot_ms"]
        assert low < mid < high
        for key in ("name", "fits", "prefill_ms", "tokens_per_second_per_device", "weight_bytes"):
            assert key in layout
        assert layout["kv_bytes_per_token"] > 0
        assert layout["max_sequences"] >= 32
        assert layout["command"].startswith("vllm serve ")
    assert report["recommended"]["layout"] == report["layouts"][0]["name"]
    assert set(report["components"]) == {*zoo.COMPONENTS, *zoo.OPT_IN}
    for row in report["components"].values():
        assert set(row) == {
            "sites",
            "weight_bytes",
            "bytes_saved_per_rank",
            "bytes_moved_per_step",
            "messages_per_step",
            "tpot_change_ms",
            "tpot_change_range_ms",
            "pays_at_tokens_per_rank",
        }
    assert report["recommended"]["sizes"] == dict.fromkeys(report["components"], 4)
    saved = sum(row["bytes_saved_per_rank"] for row in report["components"].values())
    assert report["totals"]["bytes_saved_per_rank"] == saved
    memory = report["totals"]["memory_per_rank"]
    assert memory["weight_bytes_whole"] - memory["weight_bytes"] == pytest.approx(saved, abs=2)


def test_weights_of_a_rank_are_the_models(capsys: pytest.CaptureFixture[str], config: str) -> None:
    """One rank, nothing quantised: all parameters, counted by torch."""
    model = zoo.build("deepseek_v3", device="meta", num_hidden_layers=LAYERS)
    words = ("plan", config, "--hardware", "h200", "--json", "--data-parallel-size", "1")
    _, out, _ = run(capsys, *words, "--quantization", "none")
    memory = json.loads(out)["totals"]["memory_per_rank"]
    assert memory["weight_bytes"] == sum(p.nbytes for p in model.parameters())


def test_quantization_leaves_vocabulary_weights(
    capsys: pytest.CaptureFixture[str], config: str
) -> None:
    words = ("plan", config, "--hardware", "h200", "--json", "--sizes", "8")
    whole = json.loads(run(capsys, *words, "--quantization", "none")[1])["components"]
    small = json.loads(run(capsys, *words, "--quantization", "w4a16")[1])["components"]
    for name, row in whole.items():
        if name in ("embedding", "lmhead"):
            assert small[name]["weight_bytes"] == row["weight_bytes"]
        else:
            assert small[name]["weight_bytes"] < row["weight_bytes"] / 3


def test_explain_shows_what_changes(capsys: pytest.CaptureFixture[str], config: str) -> None:
    status, out, _ = run(capsys, "explain", config, "--layer", "2")
    assert status == 0
    assert "model.layers.2.self_attn.o_proj.weight" in out
    assert "x W[" in out  # the path, with its brackets
    assert "a router: experts or tokens are chosen from its result" in out
    changes = out[out.index("what changes in its graph") :].splitlines()
    assert any(line.startswith("+") and "all_to_all_single" in line for line in changes)
    assert any(line.startswith("-") and "linear" in line for line in changes)
    for noise in ("rotary", "mask", "embed_tokens", "lm_head", "cos", "arange"):
        assert not any(noise in line for line in changes), noise
    assert len(changes) < 60
    assert "model.layers.0" not in out
    _, whole, _ = run(capsys, "explain", config, "--layer", "2", "--whole")
    assert "all_to_all_single" in whole[whole.index("\nafter") :]
    assert "all_to_all_single" not in whole[: whole.index("\nafter")]


def test_from_a_command(capsys: pytest.CaptureFixture[str], config: str) -> None:
    folder = Path(config).parent
    command = (
        f"vllm serve {folder} --data-parallel-size 16 --max-model-len 2048 --max-num-seqs 4 "
        '--kv-cache-dtype fp8 --port 8000 --additional-config \'{"finegrained_tp_config": '
        '{"mlp_tensor_parallel_size": 8}}\''
    )
    words = ("plan", "--from", command, "--hardware", "h200", "--json")
    status, out, err = run(capsys, *words)
    assert status == 0
    assert "not part of the plan: --port" in err
    report = json.loads(out)
    inputs = report["inputs"]
    assert (inputs["devices"], inputs["sequences"], inputs["input_tokens"]) == (16, 64, 2048)
    assert inputs["kv_dtype"] == "fp8"
    sizes = report["totals"]["group_sizes"]
    assert (sizes["mlp"], sizes["oproj"]) == (8, 1)
    fine = next(layout for layout in report["layouts"] if layout["sizes"] == {"mlp": 8})
    assert fine["name"] == "DP16 + EP + sizes"


def test_version_and_completion(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "--version")
    assert status == 0
    assert re.fullmatch(r"fgtp-pass \d+\.\d+\.\d+\S*\n", out)
    from fgtp_pass.cli.app import _models, _profiles

    assert _profiles("h100") == ["h100-pcie", "h100-sxm"]
    assert _models("meta") == [name for name in _models("") if name.startswith("meta-llama/")]
    done = python(
        "import os, sys; sys.argv = ['fgtp']\n"
        "os.environ |= {'_FGTP_COMPLETE': 'complete_bash', 'COMP_CWORD': '3',\n"
        "               'COMP_WORDS': 'fgtp plan --hardware h2'}\n"
        "from fgtp_pass.cli import main; main()"
    )
    assert {"h20", "h200"} <= set(done.stdout.split())


def test_hardware(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "hardware")
    assert status == 0
    for name in profiles():
        assert name in out
    _, out, _ = run(capsys, "hardware", "h100-sxm")
    assert "data sheet" in out
    _, out, _ = run(capsys, "hardware", "--json")
    assert len(json.loads(out)) == len(profiles())


@pytest.mark.parametrize("name", list(profiles()))
def test_every_constant_has_a_source(name: str) -> None:
    def check(value: Any) -> None:
        if isinstance(value, dict):
            # a link's own is told of by each of its collectives
            own = [number for key, number in value.items() if key != "shared_bandwidth"]
            if any(isinstance(number, float) for number in own):
                assert len(value["source"]) > 10
            for key, inner in value.items():
                if key != "small":  # a part of a collective's time, whose source tells of both
                    check(inner)

    assert load(name).name == name
    check(load(name).model_dump())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("plan", "deepseek-ai/DeepSeek-R2", "--hardware", "h200"), "'deepseek-ai/DeepSeek-R1'?"),
        (("plan", "nowhere/config.json", "--hardware", "h200"), "there is no file"),
        (("plan", ".", "--hardware", "h200"), "has no config.json"),
        (("plan", "CONFIG", "--hardware", "h2000"), "Did you mean 'h200'?"),
        (("plan", "CONFIG", "--hardware", "h100"), "h100-pcie and h100-sxm"),
        (("plan", "CONFIG"), "give --hardware"),
        (("plan", "--hardware", "h200"), "give a MODEL"),
        (("plan", "CONFIG", "--hardware", "h200", "--network", "roze"), "'roce'?"),
        (("plan", "CONFIG", "--hardware", "h200", "--kv-dtype", "fp7"), "'fp8'?"),
        (("plan", "CONFIG", "--hardware", "h200", "--format", "xml"), "unknown format 'xml'"),
        (("plan", "--hardware", "h200", "--from", "sglang serve m"), "vllm serve MODEL"),
        (
            ("plan", "CONFIG", "--hardware", "h200", "--batch", "1", "--sequences", "9"),
            "give one of them",
        ),
        (("plan", "CONFIG", "--hardware", "h200,a100-80g"), "mixed devices"),
        (("plan", "CONFIG", "--hardware", "h200", "--sizes", "3"), "does not divide"),
        (("plan", "CONFIG", "--hardware", "h200", "--sizes", "16"), "does not divide"),
        (("plan", "CONFIG", "--hardware", "h200", "--sizes", "opproj=8"), "'oproj'?"),
        (("plan", "CONFIG", "--hardware", "h200", "--sizes", "8", "--auto"), "give one of them"),
        (("plan", "CONFIG", "--hardware", "h200", "--objective", "memry"), "'memory'?"),
        (("plan", "CONFIG", "--hardware", "h200", "--quantization", "w8"), "'w8a8'?"),
        (("explain", "CONFIG", "--layer", "99"), "the model has 3, from 0 on"),
        (("hardware", "tpu"), "unknown hardware 'tpu'"),
        (("calibrate", "--output", "x.toml", "--dtypes", "float33"), "no dtype 'float33'"),
        (("plan", "CONFIG", "--hardware", "h200", "--html", "/no/x.html"), "cannot be written"),
        (("plan", "CONFIG", "--hardware", "h200", "--png", "/no/x.png"), "cannot be written"),
    ],
)
def test_bad_input_is_one_sentence(
    capsys: pytest.CaptureFixture[str], config: str, words: tuple[str, ...], said: str
) -> None:
    status, out, err = run(capsys, *(config if word == "CONFIG" else word for word in words))
    assert status == 1
    assert said in err
    assert err.startswith("fgtp: ")
    assert "Traceback" not in out + err
    assert "\n" not in err.strip()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is not a config.json"),
        ("{}", "has no model_type"),
        ('{"model_type": "unheard-of"}', "knows no model_type 'unheard-of'"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "cannot build this config"),
        ('{"model_type": "t5"}', "cannot build this config"),
        (
            json.dumps(
                {
                    "model_type": "llama",
                    "hidden_size": 64,
                    "intermediate_size": 64,
                    "vocab_size": 64,
                }
                | {"num_hidden_layers": 1, "num_attention_heads": 4, "dtype": "bfloat16"}
                | {"quantization_config": {"quant_method": "exl9"}}
            ),
            "quantised with 'exl9', which the cost model does not know",
        ),
    ],
)
def test_bad_configs_are_one_sentence(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: str, said: str
) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    status, _, err = run(capsys, "plan", str(path), "--hardware", "h200")
    assert status == 1
    assert said in err
    assert "\n" not in err.strip()


@pytest.mark.parametrize(
    ("content", "said"),
    [("name = ", "is not a TOML file"), ('name = "x"\nspeed = 1', "is not a hardware profile")],
)
def test_bad_profiles_are_one_sentence(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: str, said: str
) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(content)
    status, _, err = run(capsys, "hardware", str(path))
    assert status == 1
    assert said in err


def python(program: str, **keywords: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=HANG, **keywords
    )


def test_a_name_that_is_a_typo_waits_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """One attempt to connect, and no second where nobody answers."""
    tried = []

    def nobody(address: Any, timeout: float) -> None:
        tried.append(timeout)
        raise OSError("nobody there")

    monkeypatch.setattr("fgtp_pass.models.config_json.socket.create_connection", nobody)
    monkeypatch.setattr("fgtp_pass.models.config_json.getproxies", dict)
    with pytest.raises(ConfigError, match=r"Did you mean 'Qwen/Qwen3-32B'.*nobody there"):
        read_config("Qwen/Qwen3-32")
    assert tried == [5]
    with pytest.raises(ConfigError, match="no name of a model"):
        read_config("a name / with blanks")
    assert tried == [5]


@pytest.mark.parametrize(
    ("missing", "words", "extra"),
    [
        ("typer", ["--help"], "cli"),
        ("rich", ["--help"], "cli"),
        ("transformers", ["plan", "Qwen/Qwen3-32B", "--hardware", "h200"], "cli"),
        ("tomli_w", ["calibrate", "--output", "x.toml"], "cli"),
        ("matplotlib", ["plan", "Qwen/Qwen3-32B", "--hardware", "h200", "--png", "x.png"], "plot"),
    ],
)
def test_missing_packages_name_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str, words: list[str], extra: str
) -> None:
    monkeypatch.setenv("FGTP_CACHE_DIR", str(tmp_path))
    done = python(
        f"import sys; sys.modules[{missing!r}] = None; sys.argv = ['fgtp', *{words!r}]\n"
        "from fgtp_pass.cli import main; main()"
    )
    assert done.returncode == 1
    assert f"pip install '.[{extra}]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_help_needs_neither_torch_nor_sympy() -> None:
    program = (
        "import sys; sys.argv = ['fgtp', '--help']\n"
        "from fgtp_pass.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "assert 'torch' not in sys.modules and 'sympy' not in sys.modules"
    )
    done = python(program)
    assert done.returncode == 0, done.stderr
    assert "plan" in done.stdout


def test_calibrate_writes_a_profile_that_plan_reads(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, config: str
) -> None:
    path = tmp_path / "mine.toml"
    words = ("calibrate", "--world", "2", "--output", str(path), "--dtypes", "float32")
    status, out, _ = run(capsys, *words)
    assert status == 0
    assert "largest spread" in out
    profile = Hardware.model_validate(tomllib.loads(path.read_text()))
    assert profile.calibration is not None
    assert profile.calibration.world == (2,)
    assert len(profile.calibration.spread) == 7 + 12
    assert profile.memory_bandwidth.value > 0
    words = ("plan", config, "--hardware", str(path), "--data-parallel-size", "2", "--json")
    status, out, _ = run(capsys, *words)
    assert status == 0
    assert json.loads(out)["components"]["oproj"]["sites"] == 3

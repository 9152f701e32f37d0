"""The commands of layouts: what they set for which engine, and that they are read back."""

import json
import shlex
from typing import Any

import pytest
from deployments import of

from fgtp_pass import ConfigError
from fgtp_pass.cost import commands
from fgtp_pass.cost.command_line import read_command
from fgtp_pass.cost.compare import compare
from fgtp_pass.cost.layout import Deployment, Layout
from fgtp_pass.cost.model_summary import ModelSummary
from fgtp_pass.cost.quantization import SCHEMES
from fgtp_pass.cost.spelling import read_sizes
from fgtp_pass.models.summarize import summarize
from fgtp_pass.patterns import BUILTIN

pytestmark = pytest.mark.usefixtures("kept_summaries")


def serve(deployment: Deployment, layout: Layout) -> commands.Command:
    return commands.serve_command(deployment, layout, deployment.load.sequences)


def test_the_vllm_command(llama: ModelSummary) -> None:
    case = of(llama, "h100-sxm", 128, 4000, output_tokens=96, cache_dtype="fp8")
    words = shlex.split(serve(case, Layout(2, 4, sizes={"mlp": 4, "oproj": 1})).text)
    assert words[:3] == ["vllm", "serve", "meta-llama/Llama-3.1-70B"]
    flags = dict(zip(words[3::2], words[4::2], strict=True))
    assert flags == {
        "--tensor-parallel-size": "2",
        "--data-parallel-size": "4",
        "--max-model-len": "4096",
        "--max-num-seqs": "32",
        "--kv-cache-dtype": "fp8",
        "--compilation-config": '{"passes": ["fgtp"]}',
        "--additional-config": '{"finegrained_tp_config": {"mlp_tensor_parallel_size": 4}}',
    }
    plain = serve(case, Layout(8)).text
    assert "passes" not in plain
    assert "additional" not in plain


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("/models/my model/it's/config.json", "/models/my model/it's"),
        ("config.json", "."),
        ("some/model", "some/model"),
    ],
)
def test_paths_are_quoted_and_folders(llama: ModelSummary, name: str, path: str) -> None:
    case = of(llama.model_copy(update={"name": name}), "h200", 8)
    assert shlex.split(serve(case, Layout(8)).text)[2] == path


def test_precisions_that_need_a_checkpoint_say_so(
    llama: ModelSummary, deepseek: ModelSummary
) -> None:
    def said(summary: ModelSummary, scheme: str | None) -> commands.Command:
        given = None if scheme is None else SCHEMES[scheme]
        return serve(of(summary, "h200", 8, scheme=given), Layout(8))

    assert "--quantization fp8" in said(llama, "fp8").text
    assert "--quantization" not in said(llama, "w4a16").text
    assert any("quantised as w4a16" in note for note in said(llama, "w4a16").notes)
    assert "--quantization" not in said(deepseek, "fp8").text  # the checkpoint is
    assert not said(deepseek, "fp8").notes


def test_several_nodes_know_of_each_other(deepseek: ModelSummary) -> None:
    command = serve(of(deepseek, "h200", 64), Layout(1, 16, expert_parallel=True))
    assert "--data-parallel-size 16 --data-parallel-size-local 8" in command.text
    assert "--data-parallel-address NODE0 --data-parallel-rpc-port 13345" in command.text
    assert "--enable-expert-parallel" in command.text
    assert any("--data-parallel-start-rank 8." in note for note in command.notes)


def test_replicas_with_experts_are_commands_of_their_own(deepseek: ModelSummary) -> None:
    command = serve(of(deepseek, "h200", 64), Layout(8, 2))
    assert "--data-parallel-size" not in command.text
    assert "--enable-expert-parallel" not in command.text
    assert command.notes[0].startswith("Run 2 of these")


def test_a_dense_model_has_no_expert_parallelism(tmp_path: Any) -> None:
    """The convolutions of a state-space model have three dims, as experts do."""
    config = {
        "model_type": "falcon_h1", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 256,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 64,
        "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16,
        "dtype": "bfloat16",
    }  # fmt: skip
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    summary = summarize(str(path))
    assert summary.experts is None
    assert summary.attention[0].state_bytes > 0
    for option in compare(of(summary, "h200", 64), 4).options:
        case = of(summary, "h200", 64)
        assert "expert" not in serve(case, option.layout).text


def test_on_ascend_the_command_is_vllm_ascends(deepseek: ModelSummary) -> None:
    case = of(deepseek, "ascend-910b-a2", 32 * 24, scheme=SCHEMES["w8a8"])
    sizes = {"oproj": 8, "mlp": 8, "lmhead": 8, "embedding": 8}
    command = serve(case, Layout(1, 32, expert_parallel=True, sizes=sizes))
    assert "passes" not in command.text  # it is refused beside vllm-ascend's workers
    assert "--quantization ascend" in command.text
    assert '"oproj_tensor_parallel_size": 8' in command.text
    assert any("decode instances" in note for note in command.notes)
    cut = serve(case, Layout(2, 16, expert_parallel=True, sizes={"mlp": 4}))
    assert cut.text == ""
    assert "--tensor-parallel-size 1 only" in cut.notes[0]


def test_sglang_cuts_over_all_ranks_or_not_at_all(
    deepseek: ModelSummary, llama: ModelSummary
) -> None:
    case = of(deepseek, "h200", 64)

    def said(**sizes: int) -> commands.Command:
        return commands.sglang(case, Layout(1, 16, expert_parallel=True, sizes=sizes), 64)

    whole = said(mlp=16)
    assert "--tp-size 16 --dp-size 16 --enable-dp-attention --ep-size 16" in whole.text
    assert "--moe-dense-tp-size 16 --enable-dp-lm-head" in whole.text
    assert "--nnodes 2 --node-rank 0" in whole.text
    assert "--enable-dp-lm-head" not in said(lmhead=16).text
    for sizes in ({"mlp": 8}, {"oproj": 16}):
        assert said(**sizes).text == ""
        assert "or not at all" in said(**sizes).notes[0]
    assert commands.sglang(of(llama, "h200", 8), Layout(1, 8), 8).text == ""


def test_mindie_splits_two_weights_of_one_family(
    deepseek: ModelSummary, llama: ModelSummary
) -> None:
    case = of(deepseek, "ascend-910b-a2", 64)
    layout = Layout(1, 32, expert_parallel=True, sizes={"oproj": 8, "mlp": 8})
    (model,) = json.loads(commands.mindie(case, layout, 64).text)["ModelConfig"]
    assert model["models"]["deepseekv2"]["parallel_options"] == {
        "o_proj_local_tp": 8,
        "lm_head_local_tp": -1,
    }
    assert commands.mindie(of(deepseek, "h200", 64), layout, 64).text == ""
    dense_ = Layout(1, 8, sizes={"oproj": 8})
    assert commands.mindie(of(llama, "ascend-910b-a2", 64), dense_, 64).text == ""


def test_a_command_is_read_back(deepseek: ModelSummary) -> None:
    case = of(deepseek, "h200", 64, 4000, output_tokens=96, cache_dtype="fp8")
    sizes = {"mlp": 8, "lmhead": 4}
    text = serve(case, Layout(1, 16, expert_parallel=True, sizes=sizes)).text
    found = read_command(text)
    assert (found.model, found.devices, found.data_parallel_size) == (deepseek.name, 16, 16)
    assert (found.context, found.sequences_per_rank, found.cache_dtype) == (4096, 4, "fp8")
    assert found.expert_parallel
    assert found.ranks_per_node == 8
    assert read_sizes(json.dumps(found.sizes), BUILTIN).requested == sizes


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("python -m vllm", "starts with: vllm serve MODEL"),
        ("vllm serve --port 8000", "names no model"),
        ("vllm serve m -tp two", "-tp cannot be 'two'"),
        ("vllm serve m --tensor-parallel-size", "has no value"),
        ("vllm serve 'm", "cannot be read"),
    ],
)
def test_commands_that_cannot_be_read(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read_command(text)


def test_spellings_of_vllms_flags() -> None:
    found = read_command("vllm serve m -tp=2 --tensor_parallel_size 4 --max-model-len 32k --port 1")
    assert found.tensor_parallel_size in (2, 4)
    assert found.context == 32000
    assert found.ignored == ("--port",)

"""What is refused, in a sentence, before an engine starts; and what stays as in stock vLLM."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from engines import Engines, Job, engine_arguments, generate, set_environment, shared
from fork_server import ForkServer
from marks import full
from multimodal import ENVIRONMENT, write_llava
from random_checkpoints import Checkpoints, prompts
from served import refusals

SIZES = {"oproj_tensor_parallel_size": 2}


def errors_of(folders: dict[str, str], cases: dict[str, dict[str, Any]]) -> dict[str, str]:
    """What `EngineArgs(**case)` raises, by case; runs in a process of its own."""
    os.environ["RANK"] = "0"  # external_launcher reads what torchrun sets
    os.environ |= ENVIRONMENT
    from vllm.engine.arg_utils import EngineArgs
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    found = {}
    for name, case in cases.items():
        given = {"data_parallel_size": 2, "data_parallel_rank": 0} | case
        if "speculative_config" in given:
            given["speculative_config"] |= {"model": folders["llama"]}
        model = folders[given.pop("model", "llama")]
        try:
            with mock.patch.dict(os.environ):  # external_launcher has vLLM set some
                EngineArgs(model, skip_tokenizer_init=True, **given).create_engine_config()
            found[name] = ""
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


ONE_RANK = {"data_parallel_size": 1, "data_parallel_rank": None}
ON = {"compilation_config": {"passes": ["fgtp"]}}
_DRAFTS = {"num_speculative_tokens": 2, "prompt_lookup_max": 2}
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "unknown pass": ({"compilation_config": {"passes": ["fgpt"]}}, "unknown pass 'fgpt'"),
    "unknown key of vLLM's": ({"compilation_config": {"passses": ["fgtp"]}}, "passses"),
    "unknown component": (
        ON | {"additional_config": {"finegrained_tp_config": {"o_proj_tensor_parallel_size": 2}}},
        "oproj_tensor_parallel_size",
    ),
    "misspelt": (ON | {"additional_config": {"finegrained_tp_conf": SIZES}}, "unknown key"),
    "flat": (ON | {"additional_config": SIZES}, "one level down"),
    "timeout": (
        shared(fgtp_options={"timeout_seconds": 0}),
        "timeout_seconds",
    ),
    "size": (shared("oproj", size=3), "does not divide the data-parallel size 2"),
    "one rank": (shared() | ONE_RANK, "data_parallel_size = 1"),
    "pipeline beside LoRA": (
        shared() | {"pipeline_parallel_size": 2, "enable_lora": True},
        "pipeline parallelism beside LoRA",
    ),
    "pipeline beside drafts": (
        shared()
        | {"pipeline_parallel_size": 2, "speculative_config": {"method": "ngram"} | _DRAFTS},
        "pipeline parallelism beside speculative decoding",
    ),
    "sequence-parallel experts": (
        shared("sharedexpert") | {"tensor_parallel_size": 2, "enable_expert_parallel": True},
        "every tensor-parallel rank holds the shared ones whole",
    ),
    "LoRA and experts": (
        shared() | {"enable_lora": True, "hf_overrides": {"num_experts": 4}},
        "LoRA in models with experts",
    ),
    "LoRA beside drafts": (
        shared() | {"enable_lora": True, "speculative_config": {"method": "ngram"} | _DRAFTS},
        "LoRA beside speculative decoding",
    ),
    "sharded LoRA": (
        shared() | {"enable_lora": True, "fully_sharded_loras": True},
        "fully_sharded_loras",
    ),
    "launcher": (
        shared() | {"distributed_executor_backend": "external_launcher"},
        "external_launcher",
    ),
    "drafter": (
        shared() | {"speculative_config": {"method": "medusa", "num_speculative_tokens": 2}},
        "speculative decoding by another method",
    ),
    "drafter beside images": (
        shared()
        | {"model": "llava"}
        | {"speculative_config": {"method": "draft_model", "num_speculative_tokens": 2}},
        "drafters beside multimodal inputs",
    ),
    "encoder alone": (shared() | {"model": "llava", "mm_encoder_only": True}, "mm_encoder_only"),
    "encoders elsewhere": (
        shared()
        | {"model": "llava"}
        | {"ec_transfer_config": {"ec_connector": "ECExampleConnector", "ec_role": "ec_consumer"}},
        "ec_transfer_config",
    ),
    "pruned videos": (
        shared() | {"model": "llava", "video_pruning_rate": 0.5},
        "video_pruning_rate",
    ),
    "encoder and decoder": (
        shared() | {"hf_overrides": {"is_encoder_decoder": True}},
        "models that encode and decode",
    ),
    "classifier of words": (
        shared() | {"runner": "pooling", "hf_overrides": {"classifier_from_token": ["1", "2"]}},
        "classifier_from_token",
    ),
    "sizes alone": (
        ONE_RANK | {"additional_config": {"finegrained_tp_config": SIZES}},
        'passes does not contain "fgtp"',
    ),
    "worker": (shared() | {"worker_cls": "vllm.v1.worker.gpu_worker.Worker"}, "Leave worker_cls"),
}


@pytest.fixture(scope="module")
def errors(engines: Any, checkpoint: Checkpoints, tmp_path_factory: Any) -> dict[str, str]:
    """By case; and what was said meanwhile, before other calls, as "log"."""
    cases = {name: case for name, (case, _) in CASES.items()} | {
        "good": shared(),
        "one string": shared() | {"compilation_config": {"passes": "fgtp"}},
        "pass alone": ON,
        "images": shared() | {"model": "llava"},
        "pooling": shared() | {"runner": "pooling"},
    }
    llava = write_llava(tmp_path_factory.mktemp("llava"), weights=False)
    folders = {"llama": checkpoint("llama"), "llava": llava}
    (found,) = engines(1).run(errors_of, folders, cases)
    return found | {"log": engines(1).log(0)}


@pytest.mark.parametrize("case", CASES)
def test_refused_with_a_reason(errors: dict[str, str], case: str) -> None:
    assert CASES[case][1] in errors[case]


@full
def test_sampling_of_a_part_is_refused(engines: Any, checkpoint: Checkpoints) -> None:
    """With the V2 runner; V1 has none."""
    part = {"tensor_parallel_size": 2, "max_num_seqs": 8, "enable_batch_sharded_sampling": True}
    cases = {"part": shared() | part}
    (found,) = engines(1, "v2").run(errors_of, {"llama": checkpoint("llama")}, cases)
    assert "does not support batch-sharded sampling" in found["part"]


@pytest.mark.parametrize("case", ["good", "one string", "pass alone", "images", "pooling"])
def test_accepted(errors: dict[str, str], case: str) -> None:
    assert not errors[case]


JSON = """-cc '{"passes": ["fgtp"]}'"""
TWO_RANKS = "--data-parallel-size 2 --data-parallel-rank 0"
TWICE = f"{JSON} -cc.mode=3"


SIZED = f"""--additional-config '{json.dumps({"finegrained_tp_config": SIZES})}'"""


def on_the_command_line(model: str, flags: list[str], ascend: bool = False) -> dict[str, str]:
    """By flags of `vllm serve`, what its parser or configuration says of them.

    ascend: whether vLLM-Ascend seems to be installed.
    """
    commands = {one: f"vllm serve {model} {one}" for one in flags}
    return refusals(commands, {model: model}, commands if ascend else ())


def test_passes_that_vllm_drops_are_missed(
    engines: Any, checkpoint: Checkpoints, tmp_path: Path
) -> None:
    """An option beside a JSON, or beside a file, is all that vLLM keeps of both."""
    file = tmp_path / "serve.yaml"
    file.write_text("compilation-config: {passes: [fgtp]}\n")
    sharded = (JSON, f"{SIZED} -cc.passes=fgtp -cc.mode=3", f"--config {file}")
    kept = (*(f"{TWO_RANKS} {one}" for one in sharded), "-cc.mode=3", f"{JSON} -cc.passes=[]")
    lost = (TWICE, f"{SIZED} {TWICE}", f"{JSON} --compilation-config.mode=3")
    lost += (f"{JSON} -cc '{{}}'", f"--config {file} -cc.mode=3")
    (said,) = engines(1).run(on_the_command_line, checkpoint("llama"), [*kept, *lost])
    for flag in kept:
        assert said[flag] == "", flag
    for flag in lost:
        assert "ConfigError: the command line asks for the pass" in said[flag], flag
        assert "give -cc.passes=fgtp beside them" in said[flag], flag


def test_sizes_for_vllm_ascend_are_a_warning(engines: Any, checkpoint: Checkpoints) -> None:
    (said,) = engines(1).run(on_the_command_line, checkpoint("llama"), [SIZED], True)
    assert said == {SIZED: ""}
    assert "so fgtp_pass would shard nothing" in engines(1).log(0)


def test_the_pass_without_sizes_is_said(errors: dict[str, str]) -> None:
    assert 'so every component is "auto"' in errors["log"]
    assert "off for sharedexpert and qkv" in errors["log"]


def hashes_and_graphs(job: Job) -> dict[str, Any]:
    """What stock vLLM and one with the plugin must agree on; runs in a process of its own."""
    set_environment(job)
    import torch
    from vllm import LLM
    from vllm.config import CompilationConfig
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    graphs: list[str] = []
    init_backend = CompilationConfig.init_backend

    def keeping_graphs(*args: Any, **kwargs: Any) -> Any:
        backend = init_backend(*args, **kwargs)
        assert isinstance(backend, str), backend

        def compile_kept(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
            graphs.append(gm.print_readable(print_output=False))
            return torch._dynamo.lookup_backend(backend)(gm, inputs)

        return compile_kept

    with mock.patch.object(CompilationConfig, "init_backend", keeping_graphs):
        llm = LLM(**engine_arguments(job))
        tokens = generate(llm, job).tokens
    config = llm.llm_engine.vllm_config
    return {
        "loaded": "passes" in CompilationConfig.__dataclass_fields__,
        "compilation": CompilationConfig().compute_hash(),
        "engine": config.compute_hash(),
        "model class": type(config.model_config).__qualname__,
        "worker": config.parallel_config.worker_cls,
        "graphs": graphs,
        "tokens": tokens,
    }


def test_not_asked_for_changes_nothing(
    engines: Any, checkpoint: Checkpoints, tmp_path: Path
) -> None:
    """The same hashes, so the same compile caches, and the same graphs, to the letter."""
    job = Job(checkpoint("llama"), prompts(1))
    (with_plugin,) = engines(1).run(hashes_and_graphs, job)
    without = ForkServer(tmp_path, {"VLLM_PLUGINS": "fgtp_test"})
    (stock,) = Engines(1, lambda: without, tmp_path).run(hashes_and_graphs, job)
    without.close()
    assert (with_plugin.pop("loaded"), stock.pop("loaded")) == (True, False)
    assert with_plugin["graphs"]
    assert with_plugin == stock

"""Bad input: each a clear error before any weight is touched."""

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
import zoo
from decoding import prompts, relative_errors, sizes
from hypothesis import given
from hypothesis import strategies as st
from marks import quick
from ranks import Pools
from torch import nn

import fgtp_pass
from fgtp_pass import ConfigError, DetectionError, FgtpError, InferenceOnlyError, fgtp_backend
from fgtp_pass.cost.spelling import read_sizes
from fgtp_pass.options.options import parse_options
from fgtp_pass.patterns import BUILTIN
from fgtp_pass.plan.sizes import parse_sizes
from fgtp_pass.versions import check_torch
from fgtp_pass.vllm import check, host

pytestmark = quick

KEYS = [key for p in BUILTIN for key in (p.config_key, *p.aliases)]


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"oproj_tensor_parallel_sise": 2}, "Did you mean 'oproj_tensor_parallel_size'?"),
        ({"lm_head_tensor_parallel_size": 2}, "Did you mean 'lmhead_tensor_parallel_size'?"),
        ({"zzz": 2}, "Known: "),
        ({"mlp_tensor_parallel_size": "2"}, "must be a number of ranks"),
        ({"mlp_tensor_parallel_size": 2.0}, "must be a number of ranks"),
        ({"mlp_tensor_parallel_size": True}, "must be a number of ranks"),
        ({"mlp_tensor_parallel_size": [2]}, "must be a number of ranks"),
        ({"mlp_tensor_parallel_size": -2}, "is -2"),
        (
            {"oproj_tensor_parallel_size": 2, "o_proj_local_tp": 4},
            "two names of one setting, but their values differ: 2 and 4",
        ),
        ([("mlp_tensor_parallel_size", 2)], "must be a mapping"),
        ("auto", "must be a mapping"),
    ],
)
def test_bad_sizes(config: Any, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_options({"finegrained_tp_config": config})
    assert said in str(caught.value)


@pytest.mark.parametrize("off", [-1, 0, 1, None])
def test_off(off: int | None) -> None:
    parsed = parse_sizes(
        {"mlp_tensor_parallel_size": off, "oproj_tensor_parallel_size": 2}, BUILTIN
    )
    assert parsed.requested == {"oproj": 2}


@pytest.mark.parametrize(
    ("alias", "component"),
    [
        ("lm_head_local_tp", "lmhead"),
        ("o_proj_local_tp", "oproj"),
        ("denseffn_tensor_parallel_size", "mlp"),
        ("moe_dense_tp_size", "mlp"),
    ],
)
def test_aliases_of_other_systems(alias: str, component: str) -> None:
    assert parse_sizes({alias: 4}, BUILTIN).requested == {component: 4}
    canonical = f"{component}_tensor_parallel_size"
    assert parse_sizes({alias: 4, canonical: 4}, BUILTIN).requested == {component: 4}


@pytest.mark.parametrize(("ranks_on_host", "size"), [(8, 8), (6, 4), (3, 2), (1, 1)])
def test_auto_stays_on_a_host(ranks_on_host: int, size: int) -> None:
    sizes = parse_sizes(None, BUILTIN).resolve(8, ranks_on_host)
    opt_in = {pattern.component for pattern in BUILTIN if pattern.opt_in}
    assert opt_in == {"sharedexpert", "qkv"}
    assert {sizes[name] for name in opt_in} == {1}
    assert {sizes[name] for name in sizes.keys() - opt_in} == {size}


def test_what_is_opt_in_is_on_where_asked_for_or_priced() -> None:
    asked = parse_sizes({"qkv_tensor_parallel_size": "auto"}, BUILTIN)
    assert asked.resolve(8, 4)["qkv"] == 4
    assert asked.resolve(8, 4)["sharedexpert"] == 1
    assert parse_sizes(None, BUILTIN).resolve(8, 4, {"qkv": 2})["qkv"] == 2
    assert set(read_sizes("8", BUILTIN).requested) == {"embedding", "lmhead", "oproj", "mlp"}


@pytest.mark.parametrize("size", [3, 16])
def test_size_that_does_not_divide_or_exceeds(size: int) -> None:
    with pytest.raises(ConfigError, match=r"Choose one of \[1, 2, 4, 8\]"):
        parse_sizes({"mlp_tensor_parallel_size": size}, BUILTIN).resolve(8, 8)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"oproj_tensor_parallel_size": 2}, "belong one level down"),
        ({"o_proj_local_tp": 2}, "belong one level down"),
        ({"token": "equal"}, "Did you mean 'tokens'?"),
        ({"tokens": "uneven"}, "'tokens'"),
        ({"check_tokens": "no"}, "'check_tokens'"),
        ({"inner_backend": 3}, "'inner_backend'"),
        ({"allow_missing": ["mpl"]}, "Did you mean 'mlp'?"),
        ({"timeout_seconds": -1}, "'timeout_seconds'"),
    ],
)
def test_bad_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_options(options)
    assert said in str(caught.value)


@given(
    st.dictionaries(
        st.one_of(st.sampled_from(KEYS), st.text(max_size=12)),
        st.one_of(st.integers(-4, 20), st.none(), st.text(max_size=4), st.booleans(), st.floats()),
        max_size=5,
    )
)
def test_any_config_is_either_understood_or_a_config_error(config: dict[str, Any]) -> None:
    try:
        resolved = parse_sizes(config, BUILTIN).resolve(8, 8)
    except ConfigError as error:
        assert str(error)  # noqa: PT017 - a sentence, not any other exception
        return
    assert set(resolved) == {p.component for p in BUILTIN}
    for size in resolved.values():
        assert size >= 1
        assert 8 % size == 0
    for key, value in config.items():
        assert key in KEYS
        assert value == "auto" or value is None or (type(value) is int and value >= -1)


def call(model: nn.Module, **options: Any) -> torch.Tensor:
    fast = torch.compile(model, backend=fgtp_backend, options={"inner_backend": "eager", **options})
    return fast(input_ids=torch.zeros(1, 4, dtype=torch.long)).logits


@torch.no_grad()
def test_sizes_without_a_process_group() -> None:
    with pytest.raises(ConfigError, match="init_process_group"):
        call(zoo.build("llama"), finegrained_tp_config=sizes(2))


@torch.no_grad()
def test_no_process_group_and_no_sizes_is_a_plain_pass_through() -> None:
    model = zoo.build("llama")
    want = model(input_ids=torch.zeros(1, 4, dtype=torch.long)).logits
    assert torch.equal(call(model), want)
    assert torch.equal(call(model, finegrained_tp_config={}), want)
    assert fgtp_pass.applied_plan(model) is None


def test_gradients_enabled_is_an_error() -> None:
    model = zoo.build("llama")
    with pytest.raises(InferenceOnlyError, match="inference only"):
        call(model)
    assert call(model.requires_grad_(False)) is not None


@pytest.mark.parametrize("version", ["2.10.1", "1.13.0+cu117", "2.9.0a0"])
def test_unsupported_torch(version: str) -> None:
    with pytest.raises(FgtpError, match=r"torch >= 2\.11"):
        check_torch(version)


@pytest.mark.filterwarnings("error")
def test_supported_torch() -> None:
    for version in ("2.11.0", "2.13.0+cpu", "2.15.1"):
        check_torch(version)


@pytest.mark.parametrize("version", ["2.16.0a0", "3.0.0"])
def test_a_torch_newer_than_was_tested_is_a_warning(version: str) -> None:
    with pytest.warns(UserWarning, match=r"newer than any .* \(2\.11 to 2\.15\)"):
        check_torch(version)


@pytest.mark.parametrize("version", ["0.31.1", "0.34.0"])
def test_another_vllm_is_refused(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(host, "vllm_version", lambda: version)
    with pytest.raises(FgtpError, match=f"supports vLLM .* and this is vLLM {version}.*check"):
        host.check_host()


def test_another_vllm_may_be_tried(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By name and by parameters; here none of vLLM's names is there."""
    monkeypatch.setattr(host, "vllm_version", lambda: "0.34.0")
    monkeypatch.setattr(host, "_NEEDED", {"json.nothing": (), "json.loads": ("text",)})
    monkeypatch.setenv(host.ALLOW_UNKNOWN, "1")
    with pytest.raises(FgtpError, match=r"vLLM 0\.34\.0 has no json\.nothing, which the pass"):
        host.check_host()
    assert check.main() == 1
    said = capsys.readouterr().out
    assert "differs: vLLM 0.34.0 has no json.nothing" in said
    assert "differs: json.loads of vLLM 0.34.0 takes no text" in said


@pytest.mark.parametrize("component", ["mlp"])
def test_requested_component_that_matches_nothing(component: str) -> None:
    model = zoo.build("mixtral")
    ids = {"input_ids": torch.zeros(1, 4, dtype=torch.long)}
    asked: dict[str, Any] = {"finegrained_tp_config": sizes(2), "data_parallel_size": 2}
    with pytest.raises(DetectionError, match="allow_missing"):
        fgtp_pass.make_plan(model, kwargs=ids, **asked)
    plan = fgtp_pass.make_plan(model, kwargs=ids, allow_missing=[component], **asked)
    assert {site.component for site in plan.sites} == {"embedding", "oproj", "lmhead"}


@torch.no_grad()
def _missing_component() -> None:
    model = zoo.build("mixtral")
    try:
        call(model, finegrained_tp_config=sizes(2))
    finally:
        assert fgtp_pass.applied_plan(model) is None


def test_requested_component_that_matches_nothing_in_the_backend(ranks: Pools) -> None:
    for outcome in ranks(2).outcomes(_missing_component):
        assert "mlp: requested" in outcome.message
        assert outcome.error in ("DetectionError", "AgreementError")


@torch.no_grad()
def _auto_by_name() -> str:
    model = zoo.build("llama")
    ids = prompts(dist.get_rank(), 2, 4, 160)
    want = model(input_ids=ids).logits
    fast = torch.compile(model, backend="fgtp", options={"inner_backend": "eager"})
    assert relative_errors(fast(input_ids=ids).logits, want)[0] < 1e-5
    plan = fgtp_pass.applied_plan(fast)
    assert plan is not None
    assert {site.group_size for site in plan.sites} == {2}
    return plan.fingerprint


def test_backend_by_name_with_auto_sizes(ranks: Pools) -> None:
    assert len(set(ranks(2).run(_auto_by_name))) == 1


@torch.no_grad()
def _world_of_one() -> None:
    group = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    model = zoo.build("llama")
    ids = prompts(dist.get_rank(), 2, 4, 160)
    want = model(input_ids=ids).logits
    assert torch.equal(
        torch.compile(
            model,
            backend=fgtp_backend,
            options={"inner_backend": "eager", "process_group": group},
        )(input_ids=ids).logits,
        want,
    )
    assert fgtp_pass.applied_plan(model) is None
    assert os.environ["FGTP_TEST_RANK"] == str(dist.get_rank())


def test_a_group_of_one_rank_is_a_plain_pass_through(ranks: Pools) -> None:
    ranks(2).run(_world_of_one)

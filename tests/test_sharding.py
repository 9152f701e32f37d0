"""Weights become shards: memory, guards, reads, checkpoints, sharing, and the way back."""

import copy
import io
import warnings
from typing import Any
from unittest import mock

import psutil
import pytest
import torch
import torch.distributed as dist
import zoo
from decoding import DECODE_STEPS, decode, prompts, relative_errors, sizes
from peak_memory import PeakMemory
from ranks import Pools
from torch import nn

import fgtp_pass
from fgtp_pass import ShardedWeightError, fgtp_backend
from fgtp_pass.backend import runtime


def compiled(model: nn.Module, k: int = 2, **options: Any) -> Any:
    given = {"finegrained_tp_config": sizes(k), "inner_backend": "eager", **options}
    return torch.compile(model, backend=fgtp_backend, options=given)


@torch.no_grad()
def step(model: Any, length: int = 6, batch: int = 2) -> torch.Tensor:
    config = getattr(model, "_orig_mod", model).config
    ids = prompts(dist.get_rank(), batch, length, config.vocab_size)
    return model(input_ids=ids, use_cache=False).logits


def _second_call_counts(dynamic: bool | None) -> list[int]:
    model = zoo.build("llama")
    calls = []

    def backend(gm: Any, inputs: Any) -> Any:
        calls.append(1)
        return fgtp_backend(
            gm, inputs, options={"finegrained_tp_config": sizes(2), "inner_backend": "eager"}
        )

    fast = torch.compile(model, backend=backend, dynamic=dynamic)
    counts = []
    for length in (6, 6, 7, 8, 9, 10):
        step(fast, length)
        counts.append(len(calls))
    return counts


def test_no_recompile_on_second_call_and_none_after_first_dynamic(ranks: Pools) -> None:
    for counts in ranks(2).run(_second_call_counts, None):
        first, second, dynamic, *later = counts
        assert first == second == 1
        assert dynamic == 2, "a new token count makes the graph dynamic once"
        assert set(later) == {2}, "and never again"


def test_idempotent_when_dynamo_calls_the_backend_again(ranks: Pools) -> None:
    for counts in ranks(2).run(_second_call_counts, True):
        assert len(set(counts)) == 1


def _memory() -> dict[str, float]:
    step(compiled(zoo.build("llama")))  # what compiling takes is not what this measures
    model = zoo.build(
        "llama",
        hidden_size=1024,
        intermediate_size=8192,
        vocab_size=32000,
        num_hidden_layers=2,
        head_dim=128,
    )
    process = psutil.Process()
    want = step(model)
    largest = max(p.numel() * p.element_size() for p in model.parameters())
    full = sum(p.numel() * p.element_size() for p in model.parameters())
    fast = compiled(model)
    shard, seen = runtime.shard_parameters, {}

    def watched(*args: Any) -> int:
        seen["before"] = process.memory_info().rss
        with PeakMemory(process) as peak:
            new = shard(*args)
        seen.update(peak=peak.bytes, after=process.memory_info().rss)
        return new

    with mock.patch.object(runtime, "shard_parameters", watched):
        got = step(fast)
    assert relative_errors(got, want)[0] < 1e-5
    plan = fgtp_pass.applied_plan(fast)
    assert plan is not None
    held = sum(p.untyped_storage().nbytes() for p in _whole(model))
    held += sum(t.numel() * t.element_size() for t in _shards(model))
    assert full - held == plan.bytes_saved_per_rank
    return {
        "returned": seen["before"] - seen["after"],
        "planned": plan.bytes_saved_per_rank,
        "peak": seen["peak"] - seen["before"],
        "largest": largest,
    }


def _whole(model: nn.Module) -> list[torch.Tensor]:
    return [p for p in model.parameters() if type(p) is nn.Parameter]


def _shards(model: nn.Module) -> list[torch.Tensor]:
    state = fgtp_pass.shard_state_dict(model)
    sharded = {n for n, p in model.named_parameters() if type(p) is not nn.Parameter}
    return [state[name] for name in sharded]


def test_memory_is_returned_and_its_peak_is_one_weight_above_the_model(ranks: Pools) -> None:
    for seen in ranks(2).run(_memory):
        assert seen["planned"] > 200e6, seen
        assert seen["returned"] >= 0.95 * seen["planned"], seen
        assert seen["peak"] <= 1.05 * seen["largest"], seen


def _reads() -> dict[str, str]:
    model = zoo.build("llama")
    fast = compiled(model)
    step(fast)
    weight = model.model.layers[0].mlp.down_proj.weight
    other = torch.zeros(weight.shape)
    attempts = {
        "add": lambda: weight + 1,
        "clone": lambda: weight.clone(),
        "detach": lambda: weight.detach(),
        "copy_": lambda: weight.data.copy_(other),
        "copy from": lambda: other.copy_(weight),
        "in_place": lambda: torch.nn.init.zeros_(weight),
        "data": lambda: weight.data,
        "numpy": lambda: weight.numpy(),
        "tolist": lambda: weight.tolist(),
        "item": lambda: weight[0, 0].item(),
        "data_ptr": lambda: weight.data_ptr(),
        "storage": lambda: weight.untyped_storage(),
        "torch.save": lambda: torch.save(weight, io.BytesIO()),
        "save of keep_vars": lambda: torch.save(model.state_dict(keep_vars=True), io.BytesIO()),
        "state_dict": lambda: model.state_dict(),
        "deepcopy": lambda: copy.deepcopy(weight),
        "deepcopy of the model": lambda: copy.deepcopy(model),
        "to": lambda: model.to(torch.float64),
        "eager forward": lambda: step(model),
        "load_state_dict": lambda: model.load_state_dict(zoo.build("llama").state_dict()),
        "linear": lambda: torch.nn.functional.linear(torch.zeros(1, weight.shape[1]), weight),
    }
    said = {}
    for name, attempt in attempts.items():
        try:
            attempt()
            said[name] = "no error"
        except (ShardedWeightError, RuntimeError) as error:
            said[name] = str(error)
    # what may be read, and a model that still works after all of that
    assert weight.shape == (64, 144)
    assert weight.dtype is torch.float32
    assert "1/2 on this rank" in repr(weight)
    assert isinstance(weight, nn.Parameter)
    assert len(list(model.parameters())) > 0
    step(fast)
    return said


def test_reads_of_sharded_weights_say_what_to_call_instead(ranks: Pools) -> None:
    for said in ranks(2).run(_reads):
        silent = {name: text for name, text in said.items() if "fgtp_pass.unshard" not in text}
        assert not silent


def _round_trip(name: str, k: int) -> None:
    model = zoo.build(name)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    want = step(model)
    fast = compiled(model, k)
    step(fast)
    full = fgtp_pass.full_state_dict(fast)
    assert list(full) == list(before)
    for key, tensor in before.items():
        assert torch.equal(full[key], tensor), key
    local = fgtp_pass.shard_state_dict(fast)
    plan = fgtp_pass.applied_plan(fast)
    assert plan is not None
    for fqn, (cut, size) in plan.cuts().items():
        assert tuple(local[fqn].shape) == cut.shard_shape(size)
    fgtp_pass.unshard(fast)
    assert fgtp_pass.applied_plan(fast) is None
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key]), key
        assert tensor.stride() == before[key].stride()
    assert torch.equal(step(model), want)
    assert relative_errors(step(fast), want)[0] < 1e-5, "the next call shards again"
    assert fgtp_pass.applied_plan(fast) is not None


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "starcoder2", "deepseek_v3"])
def test_unshard_and_full_state_dict_are_bit_exact(ranks: Pools, name: str) -> None:
    ranks(2).run(_round_trip, name, 2)


def _tied() -> None:
    model = zoo.build("gemma2")
    fast = compiled(model)
    step(fast)
    weight = model.lm_head.weight
    assert weight is model.model.embed_tokens.weight
    plan = fgtp_pass.applied_plan(fast)
    assert plan is not None
    by_component = {site.component: site.weights[0].fqn for site in plan.sites}
    assert by_component["embedding"] == by_component["lmhead"]
    once = [w for w in plan.cuts() if "embed_tokens" in w or "lm_head" in w]
    assert len(once) == 1
    full = fgtp_pass.full_state_dict(fast)
    assert full["lm_head.weight"] is full["model.embed_tokens.weight"]


def test_tied_weights_share_one_shard(ranks: Pools) -> None:
    ranks(2).run(_tied)


def _tied_sizes(config: dict[str, int]) -> None:
    step(compiled(zoo.build("gemma2"), finegrained_tp_config=config))


def test_tied_components_of_different_sizes_are_an_error(ranks: Pools) -> None:
    for config in (sizes(embedding=2), sizes(embedding=2, lmhead=0)):
        for outcome in ranks(2).outcomes(_tied_sizes, config):
            assert "one tied weight of two components, but their sizes differ" in outcome.message


def _from_pretrained(folder: str) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    want = step(model)
    fast = compiled(model)
    assert relative_errors(step(fast), want)[0] < 1e-5
    full = fgtp_pass.full_state_dict(fast)
    fgtp_pass.unshard(fast)
    assert all(torch.equal(full[k], v) for k, v in model.state_dict().items())


def test_from_pretrained_checkpoint(ranks: Pools, tmp_path: Any) -> None:
    zoo.build("qwen3").save_pretrained(tmp_path)
    ranks(2).run(_from_pretrained, str(tmp_path))


def _save_pretrained(folder: str) -> None:
    """A sharded model's checkpoint loads as a normal one."""
    from transformers import AutoModelForCausalLM

    model = zoo.build("qwen3")
    want = step(model)
    fast = compiled(model)
    step(fast)
    whole = fgtp_pass.full_state_dict(fast)
    if dist.get_rank() == 0:
        torch.save(whole, f"{folder}/model.pt")
    dist.barrier()
    again = AutoModelForCausalLM.from_config(model.config).eval()
    again.load_state_dict(torch.load(f"{folder}/model.pt"))
    assert torch.equal(step(again), want)


def test_full_state_dict_is_a_normal_checkpoint(ranks: Pools, tmp_path: Any) -> None:
    ranks(2).run(_save_pretrained, str(tmp_path))


def _two_models() -> None:
    one, two = zoo.build("llama", seed=1), zoo.build("gpt2", seed=2)
    wants = [step(one), step(two)]
    fast_one = compiled(one)
    fast_two = compiled(two, finegrained_tp_config=sizes(oproj=2, mlp=2))
    for _ in range(2):
        assert relative_errors(step(fast_one), wants[0])[0] < 1e-5
        assert relative_errors(step(fast_two), wants[1])[0] < 1e-5
    plan_one, plan_two = fgtp_pass.applied_plan(one), fgtp_pass.applied_plan(two)
    assert plan_one is not None
    assert plan_two is not None
    assert {site.component for site in plan_one.sites} == set(zoo.COMPONENTS)
    assert {site.component for site in plan_two.sites} == {"oproj", "mlp"}


def test_two_compiled_models_in_one_process(ranks: Pools) -> None:
    ranks(2).run(_two_models)


def _twins() -> None:
    """Two models of one class run the same code, so Dynamo may share a graph between them."""
    one, two = zoo.build("llama", seed=1), zoo.build("llama", seed=2)
    wants = [step(one), step(two)]
    fast_one, fast_two = compiled(one), compiled(two)
    for _ in range(2):
        assert relative_errors(step(fast_one), wants[0])[0] < 1e-5
        assert relative_errors(step(fast_two), wants[1])[0] < 1e-5


def test_two_models_of_one_class_keep_their_own_shards(ranks: Pools) -> None:
    ranks(2).run(_twins)


class OddReader(nn.Module):
    """A model that reads weights of its components in places that no pattern describes."""

    def __init__(self) -> None:
        super().__init__()
        self.model = zoo.build("gpt2")
        self.config = self.model.config

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> Any:
        out = self.model(input_ids=input_ids, use_cache=use_cache)
        block = self.model.transformer.h[0]
        extra = self.model.transformer.wte.weight.mean() + block.mlp.c_proj.weight[3, 5]
        out.logits = out.logits + extra * block.attn.c_proj.weight.abs().max()
        return out


def _unmatched_reads() -> list[str]:
    model = OddReader().eval()
    want = step(model)
    fast = compiled(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = step(fast)
    assert relative_errors(got, want)[0] < 1e-5
    return [str(w.message) for w in caught if "is gathered there" in str(w.message)]


def test_reads_that_no_pattern_matched_are_gathered_with_a_warning(ranks: Pools) -> None:
    for messages in ranks(2).run(_unmatched_reads):
        text = "\n".join(messages)
        for name in ("wte.weight", "mlp.c_proj.weight", "attn.c_proj.weight"):
            assert name in text


def _decode_after_unshard() -> None:
    model = zoo.build("llama")
    ids = prompts(dist.get_rank(), 2, 5, 160)
    want, chosen = decode(model, ids, DECODE_STEPS)
    fast = compiled(model)
    decode(fast, ids, 2)
    fgtp_pass.unshard(fast)
    got, _ = decode(fast, ids, DECODE_STEPS, tokens=chosen)
    assert relative_errors(got, want)[0] < 1e-5


def test_decoding_goes_on_after_unshard(ranks: Pools) -> None:
    ranks(2).run(_decode_after_unshard)


def _generate() -> None:
    """Hugging Face's own loop over a compiled forward, in inference mode."""
    model = zoo.build("llama")
    ids = prompts(dist.get_rank(), 2, 5, 160)
    with torch.inference_mode():
        want = model.generate(ids, max_new_tokens=6, do_sample=False)
        model.forward = compiled(model.forward)
        got = model.generate(ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(got, want)
    assert fgtp_pass.applied_plan(model) is not None


def test_generate_in_inference_mode(ranks: Pools) -> None:
    ranks(2).run(_generate)


class Special(nn.Parameter):
    pass


@torch.no_grad()
def _special_parameters() -> None:
    model = zoo.build("llama")
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.__class__ = Special
    want = step(model)
    fast = compiled(model, allow_missing=["oproj"])
    assert relative_errors(step(fast), want)[0] < 1e-5
    plan = fgtp_pass.applied_plan(fast)
    assert plan is not None
    assert {site.component for site in plan.sites} == {"embedding", "lmhead", "mlp"}
    (reason,) = {left.reason for left in plan.left_alone if "o_proj" in left.fqn}
    assert "is a Special, not a plain one" in reason


def test_parameters_of_other_classes_are_left_alone(ranks: Pools) -> None:
    ranks(2).run(_special_parameters)

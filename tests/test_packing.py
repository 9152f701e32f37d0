"""Shards that are stored packed: which, that they compute the same, and the way back."""

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import zoo
from decoding import decode, prompts, relative_errors, sizes
from ranks import Pools
from torch import nn

import fgtp_pass
from fgtp_pass import fgtp_backend
from fgtp_pass.weights import packing
from fgtp_pass.weights.state import sharded_parameters

DTYPES = [
    d for d in (torch.float32, torch.bfloat16) if packing.supports(torch.empty(2, 2, dtype=d))
]
needs_packing = pytest.mark.skipif(not DTYPES, reason="oneDNN packs no weights on this machine")
AS_INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}


def is_packed(weight: torch.Tensor) -> bool:
    """Whether the data are in the packed copy, and nowhere else."""
    assert hasattr(weight, "_fgtp_packed") == (weight.untyped_storage().nbytes() == 0)
    return hasattr(weight, "_fgtp_packed")


def packed_names(model: nn.Module) -> set[str]:
    sharded = sharded_parameters(model)
    return {name for name, p in sharded.items() if is_packed(p._fgtp_record.shard)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (33, 17), (64, 128), (1001, 300)], ids=str)
def test_unpacked_is_equal_bit_for_bit(shape: tuple[int, int], dtype: torch.dtype) -> None:
    integers = AS_INTEGERS[dtype]
    limits = torch.iinfo(integers)  # every bit pattern: infinities, nans, denormals
    bits = torch.randint(limits.min, limits.max, shape, dtype=integers)
    weight = bits.view(dtype).clone()
    packing.pack(weight)
    assert is_packed(weight)
    assert (weight.shape, weight.dtype, weight.stride()) == (shape, dtype, (shape[1], 1))
    assert torch.equal(packing.plain(weight).view(integers), bits)
    assert is_packed(weight), "reading does not unpack"
    with torch.inference_mode():
        packing.unpack(weight)
    assert not is_packed(weight)
    assert not weight.is_inference()
    assert torch.equal(weight.view(integers), bits)
    assert packing.plain(weight) is weight


@needs_packing
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_op_takes_packed_and_plain_weights(backend: str, with_bias: bool) -> None:
    @torch.compile(backend=backend, dynamic=True, fullgraph=True)
    def linear(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
        return torch.ops.fgtp_pass.linear(x, w, b) * 2

    bias = torch.randn(50) if with_bias else None
    packed = torch.randn(50, 40)
    plain = packed.clone()
    packing.pack(packed)
    with torch.no_grad():
        for rows in (2, 3, 70):
            x = torch.randn(rows, 40)
            for weight in (packed, plain):
                torch.testing.assert_close(linear(x, weight, bias), 2 * F.linear(x, plain, bias))


def compiled(model: nn.Module, inner_backend: str = "eager", **options: Any) -> Any:
    given = {"finegrained_tp_config": sizes(2), "inner_backend": inner_backend, **options}
    return torch.compile(model, backend=fgtp_backend, options=given)


@torch.no_grad()
def step(model: Any, length: int = 6) -> torch.Tensor:
    config = getattr(model, "_orig_mod", model).config
    ids = prompts(dist.get_rank(), 2, length, config.vocab_size)
    return model(input_ids=ids, use_cache=False).logits


def _decodes(inner_backend: str, dtype: torch.dtype) -> tuple[set[str], float, float]:
    model = zoo.build("qwen2", dtype=dtype)
    ids = prompts(dist.get_rank(), 2, 5, 160)
    want, chosen = decode(model, ids, 2)  # a graph of one length, and one of any
    fast = compiled(model, inner_backend)
    got, _ = decode(fast, ids, 2, tokens=chosen)
    return packed_names(model), *relative_errors(got, want)


@pytest.mark.parametrize("inner_backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shards_of_plain_matmuls_are_packed(
    ranks: Pools, inner_backend: str, dtype: torch.dtype
) -> None:
    layer = ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    want = {f"model.layers.{i}.{name}.weight" for i in range(2) for name in layer}
    for names, largest, rms in ranks(2).run(_decodes, inner_backend, dtype):
        assert names == want | {"lm_head.weight"}, "and not the embedding, whose rows are looked up"
        if dtype is torch.float32:
            assert largest < 1e-5
        else:  # Inductor rounds to half precision less often than the model it is compared with
            assert rms < (0.03 if inner_backend == "inductor" else 0.02)


def _packed_of(name: str) -> set[str]:
    model = zoo.build(name)
    want = step(model)
    fast = compiled(model)
    assert relative_errors(step(fast), want)[0] < 1e-5
    return packed_names(model)


@needs_packing
def test_a_tied_weight_stays_plain(ranks: Pools) -> None:
    for names in ranks(2).run(_packed_of, "gemma2"):
        assert names
        assert not any("embed_tokens" in name or "lm_head" in name for name in names)


class Switch(nn.Module):
    """A model that, when asked to, reads a weight in a way that no pattern describes."""

    def __init__(self, seed: int = 0, odd: bool = False) -> None:
        super().__init__()
        self.model = zoo.build("llama", seed=seed)
        self.config = self.model.config
        self.odd = odd

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> Any:
        out = self.model(input_ids=input_ids, use_cache=use_cache)
        if self.odd:
            out.logits = out.logits + self.model.model.layers[0].mlp.up_proj.weight.mean()
        return out


def _needed_plain_later() -> None:
    model = Switch().eval()
    up = model.model.model.layers[0].mlp.up_proj
    before = up.weight.detach().clone()
    wants = {False: step(model)}
    model.odd = True
    wants[True] = step(model)
    fast = compiled(model)
    name = "model.model.layers.0.mlp.up_proj.weight"
    for odd, packed in ((False, True), (True, False), (False, False), (True, False)):
        model.odd = odd
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is gathered
            assert relative_errors(step(fast), wants[odd])[0] < 1e-5
        assert (name in packed_names(model)) == packed
        assert packed_names(model), "the other shards stay packed"
    assert torch.equal(fgtp_pass.full_state_dict(fast)[name], before)
    fgtp_pass.unshard(fast)
    assert torch.equal(up.weight, before)


@needs_packing
def test_a_graph_that_needs_the_plain_shard_unpacks_it_for_good(ranks: Pools) -> None:
    ranks(2).run(_needed_plain_later)


def _graph_of_a_twin() -> int:
    """Dynamo calls the graph that one model was compiled to with the other's packed weights."""
    one, two = Switch(seed=1, odd=True).eval(), Switch(seed=2).eval()
    graphs = []

    def backend(gm: Any, inputs: Any) -> Any:
        graphs.append(gm)
        options = {"finegrained_tp_config": sizes(2), "inner_backend": "eager"}
        return fgtp_backend(gm, inputs, options=options)

    wants = [step(two), step(one)]
    two.odd = True
    wants.append(step(two))
    two.odd = False
    fast_one, fast_two = (torch.compile(model, backend=backend) for model in (one, two))
    assert relative_errors(step(fast_two), wants[0])[0] < 1e-5
    assert relative_errors(step(fast_one), wants[1])[0] < 1e-5
    two.odd = True
    assert relative_errors(step(fast_two), wants[2])[0] < 1e-5
    return len(graphs)


@needs_packing
def test_a_graph_compiled_with_plain_shards_takes_no_packed_ones(ranks: Pools) -> None:
    assert ranks(2).run(_graph_of_a_twin) == [2, 2]


def _idles() -> None:
    """A rank without tokens multiplies its packed shards too."""
    model = zoo.build("llama")
    want = step(model)
    fast = compiled(model, tokens="ragged")
    step(fast)
    assert packed_names(model)
    for working in range(2):
        if dist.get_rank() == working:
            assert relative_errors(step(fast), want)[0] < 1e-5
        else:
            fgtp_pass.idle_step(fast)


@needs_packing
def test_idle_ranks_use_packed_shards(ranks: Pools) -> None:
    ranks(2).run(_idles)


def _without_onednn() -> set[str]:
    with torch.backends.mkldnn.flags(enabled=False):
        return _packed_of("llama")


def test_nothing_is_packed_where_onednn_is_off(ranks: Pools) -> None:
    assert ranks(2).run(_without_onednn) == [set(), set()]


def test_other_tensors_are_not_packed() -> None:
    assert not packing.supports(torch.empty(2, 2, device="meta"))
    assert not packing.supports(torch.empty(2, 2, dtype=torch.float64))
    assert not packing.supports(torch.empty(2, 2, 2))


def test_a_tensor_that_numpy_has_seen_is_packed() -> None:
    weight = torch.randn(64, 32)
    seen = weight.numpy()  # from here on its storage cannot be resized
    before = weight.clone()
    if packing.supports(weight):
        packing.pack(weight)
        packing.unpack(weight)
    assert torch.equal(weight, before)
    assert seen.shape == (64, 32)

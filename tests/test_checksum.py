"""A checksum tells any two weights apart that differ in a bit, whatever their dtype and layout."""

from collections.abc import Callable

import pytest
import torch
from marks import quick

from fgtp_pass.weights.checksum import checksum

pytestmark = quick

DTYPES = [
    torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn,
    torch.float8_e5m2, torch.int8, torch.uint8, torch.bool, torch.complex64,
]  # fmt: skip


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (70, 129), (4096,)])
def test_one_bit_of_any_dtype(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    weight = random(*shape, dtype=dtype)
    other = weight.clone()
    assert checksum(other) == checksum(weight)
    other.view(-1).view(torch.uint8)[-1] ^= 1
    assert checksum(other) != checksum(weight)


def _swap(dim: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda w: w.index_select(dim, torch.tensor([1, 0, *range(2, w.shape[dim])]))


@pytest.mark.parametrize(
    "change", [_swap(0), _swap(1), lambda w: w.flip(0), lambda w: w.roll(512, 1), lambda w: -w]
)
def test_words_in_other_places(change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    weight = random(64, 2048)
    assert checksum(change(weight)) != checksum(weight)


def test_values_that_compare_equal_and_those_that_never_do() -> None:
    assert checksum(torch.tensor([0.0])) != checksum(torch.tensor([-0.0]))
    assert checksum(torch.tensor([torch.nan])) == checksum(torch.tensor([torch.nan]))


def test_equal_in_any_layout() -> None:
    weight = random(70, 129)
    assert checksum(weight.T.contiguous().T) == checksum(weight)
    assert checksum(torch.cat([weight[:1], weight])[1:]) == checksum(weight)
    odd = torch.cat([torch.zeros(1), weight.flatten()])[1:].view(70, 129)
    assert checksum(odd) == checksum(weight), "words that do not start at a multiple of 8 bytes"
    with torch.inference_mode():
        assert checksum(torch.nn.Parameter(weight)) == checksum(weight)

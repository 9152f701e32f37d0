"""Constants from times: what is known is found again."""

from itertools import product
from types import SimpleNamespace

import pytest
import torch

from fgtp_pass.algebra.path import sent_bytes
from fgtp_pass.algebra.placement import Collective
from fgtp_pass.calibration import measure
from fgtp_pass.calibration.fit import _fit_collective, _spread, fit_roofline

ROWS = (1, 2, 4, 8, 16, 32, 64, 256)


@pytest.mark.parametrize("overlap", [0.0, 0.35, 1.0])
@pytest.mark.parametrize("row", [1e-6, 2e-5, 1e-3])
def test_a_roofline_is_found_again(overlap: float, row: float) -> None:
    reading = 1e-3
    times = {n: max(reading, row * n) + (1 - overlap) * min(reading, row * n) for n in ROWS}
    m, c, o = fit_roofline(times)
    fitted = {n: max(m, c * n) + (1 - o) * min(m, c * n) for n in ROWS}
    assert fitted == pytest.approx(times, rel=1e-6)
    if row == 2e-5:  # both sides of the bend are seen, so the constants are unique
        assert (m, c, o) == pytest.approx((reading, row, overlap), rel=1e-3)


@pytest.mark.parametrize("kind", list(Collective))
def test_a_collective_is_found_again(kind: Collective) -> None:
    base, peer, bandwidth, row_bytes = 2e-5, 3e-6, 5e9, 8192
    moves = {
        (kind, k, n): [base + peer * (k - 1) + n * sent_bytes(kind, row_bytes, k) / bandwidth] * 3
        for k, n in product((2, 4, 8), (4, 32, 128))
    }
    found = _fit_collective(kind, moves, (2, 4, 8), row_bytes, "made up")
    assert found.base_seconds == pytest.approx(base, rel=1e-3)
    assert found.seconds_per_peer == pytest.approx(peer, rel=1e-3)
    assert found.bytes_per_second == pytest.approx(bandwidth, rel=1e-3)


def test_noise_gives_no_impossible_constants() -> None:
    kind = Collective.ALL_GATHER
    moves = {(kind, 2, n): [t] * 3 for n, t in ((4, 9e-4), (32, 5e-4), (128, 2e-4))}
    found = _fit_collective(kind, moves, (2,), 8192, "made up")
    assert found.base_seconds >= 0
    assert found.bytes_per_second > 0
    assert found.seconds_per_peer == 0


def test_a_busy_machine_is_measured_again_and_then_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Other work hid what a collective adds to matmuls: there was nothing to fit."""
    given: list[float] = []
    monkeypatch.setattr(measure, "_times", lambda group, chain: [given.pop(0)] * 3)
    group = SimpleNamespace(rank=0, component_group=lambda size: None)
    weights = [torch.zeros(2048, 2048)]

    def chain() -> list[float]:
        return measure._collective_chain(group, Collective.ALL_GATHER, 2, 4, weights)  # type: ignore[arg-type]

    # matmuls alone, and with three of the collective; then again
    given[:] = [5.0, 4.0, 5.0, 8.0]
    assert chain() == [1.0] * 3
    assert not caplog.messages
    given[:] = [5.0, 4.0] * 3 + [1.5]
    assert chain() == [0.5] * 3
    assert "an all_gather of 4 rows over 2 ranks" in caplog.text
    times = {(Collective.ALL_GATHER, 2, n): [0.5] * 3 for n in (4, 32)}
    assert _fit_collective(Collective.ALL_GATHER, times, (2,), 8192, "").base_seconds >= 0


def test_spread_is_relative() -> None:
    assert _spread([1.0] * 11) == 0
    assert _spread([float(v) for v in range(1, 12)]) == pytest.approx(8 / 6, abs=1e-3)

"""Layouts are priced as the pass runs them: joined sites, weights in place of tokens."""

from typing import Any

import pytest

from fgtp_pass.cost import formulas
from fgtp_pass.cost.hardware import load
from fgtp_pass.cost.layout import Deployment, Layout, Load
from fgtp_pass.cost.model_summary import ModelSummary
from fgtp_pass.cost.quantization import SCHEMES
from fgtp_pass.models.summarize import summarize

pytestmark = pytest.mark.usefixtures("kept_summaries")

MOVING = "fine-grained collectives"


@pytest.fixture(scope="module")
def llama() -> ModelSummary:
    return summarize("meta-llama/Llama-3.1-8B")


def of(summary: ModelSummary, **given: Any) -> Deployment:
    return Deployment(summary, load("h200"), Load(64, 8192, **given), 8)


def layout(**sizes: int) -> Layout:
    return Layout(data_parallel_size=8, sizes=sizes)


def test_joined_sites_save_a_message_each(llama: ModelSummary) -> None:
    deployment = of(llama)
    together = deployment.parts(layout(oproj=8, mlp=8), 64)[MOVING]
    apart = [deployment.parts(layout(**{name: 8}), 64)[MOVING] for name in ("oproj", "mlp")]
    assert deployment.summary.joined is not None
    joined = [site for site in deployment.summary.joined.sites if site.component == "mlp"]
    assert len(joined) == 32
    assert {site.collectives for site in joined} == {("reduce_scatter",)}
    assert 0.6 * sum(apart) < together < 0.95 * sum(apart)


def test_sizes_that_differ_are_not_joined(llama: ModelSummary) -> None:
    deployment = of(llama)
    both = deployment.parts(layout(oproj=4, mlp=8), 64)[MOVING]
    one, other = (deployment.parts(layout(**s), 64)[MOVING] for s in ({"oproj": 4}, {"mlp": 8}))
    assert both == pytest.approx(one + other)


def test_a_prefill_moves_plain_weights_and_quantised_ones_never(llama: ModelSummary) -> None:
    sizes = layout(mlp=8)
    for scheme in (None, SCHEMES["fp8"]):
        deployment = of(llama, scheme=scheme)
        shape, cluster = deployment.shapes["mlp"], deployment.cluster(sizes)
        seconds = {
            name: {
                part: cluster.seconds(expression, shape, 8, 8192)
                for part, expression in (("dense matmuls", computing), (MOVING, moving))
            }
            for name, computing, moving in (
                ("tokens", formulas.COMPUTING_SECONDS, formulas.COLLECTIVES_SECONDS),
                ("weights", formulas.WHOLE_SECONDS, formulas.GATHERING_SECONDS),
            )
        }
        assert sum(seconds["weights"].values()) < sum(seconds["tokens"].values())
        taken = "weights" if scheme is None else "tokens"
        whole, cut = (deployment.parts(one, 8, prefill=True) for one in (layout(), sizes))
        assert cut[MOVING] == pytest.approx(seconds[taken][MOVING])
        more = cut["dense matmuls"] - whole["dense matmuls"]
        unsharded = cluster.seconds(formulas.WHOLE_SECONDS, shape, 1, 8192)
        assert more == pytest.approx(seconds[taken]["dense matmuls"] - unsharded, abs=1e-9)


def test_gathering_by_hand(llama: ModelSummary) -> None:
    """A rank brings 1/8 of each weight and sends it to seven others, at the link's bandwidth."""
    deployment = of(llama)
    cluster = deployment.cluster(layout(mlp=8))
    seconds = cluster.seconds(formulas.GATHERING_SECONDS, deployment.shapes["mlp"], 8, 1)
    time = load("h200").within_node.all_gather
    sent = 32 * 3 * 4096 * 14336 * 2 / 8 * 7
    latency = 32 * 3 * (time.base_seconds + 7 * time.seconds_per_peer)
    assert seconds == pytest.approx(latency + sent / time.bytes_per_second, rel=1e-6)


def test_in_decode_tokens_move(llama: ModelSummary) -> None:
    deployment = of(llama)
    shape, cluster = deployment.shapes["mlp"], deployment.cluster(layout(mlp=8))
    found = deployment.parts(layout(mlp=8), 64)[MOVING]
    assert found == pytest.approx(cluster.seconds(formulas.COLLECTIVES_SECONDS, shape, 8, 8))

"""Graphs before and after the pass, pinned as text. Update: pytest --update-snapshots."""

from collections import Counter
from pathlib import Path

import pytest
import torch
import zoo
from decoding import sizes
from ranks import Pools
from test_detection import missing

import fgtp_pass
from fgtp_pass import GraphSnapshot

FOLDER = Path(__file__).parent / "snapshots"
KINDS = {
    "all_gather": "all_gather_into_tensor",
    "all_to_all": "all_to_all_single",
    "reduce_scatter": "reduce_scatter_tensor",
    "all_reduce": "all_reduce",
}
# per architecture how many of each, in the order of KINDS, for a model of two layers.
# embedding: 1 + 0 + 1; then per layer attention's exchange, an all_reduce into the FFN, and a
# reduce_scatter behind it, but an all_reduce into the lm_head behind the last; lm_head: 1 exchange.
ONE_AFTER_THE_OTHER = (1, 2 + 1, 1 + 1, 2 + 1)
# attention and FFN share one all_reduce, which is also the next layer's way to all tokens
BESIDE_EACH_OTHER = (1, 2 + 1, 0, 1 + 2)
# norms between o_proj and the residual: the residual is gathered beside the result
SANDWICH = (1 + 2 * 2 + 1, 1, 1 + 2, 0)
COUNTS = {
    "llama": ONE_AFTER_THE_OTHER,
    "gpt2": ONE_AFTER_THE_OTHER,
    "falcon": BESIDE_EACH_OTHER,
    "phi3": ONE_AFTER_THE_OTHER,
    "gemma3": SANDWICH,
    # three layers, the first with a dense FFN; the other o_projs touch experts; wide o_projs
    "deepseek_v3": (1 + 1, 3 + 1, 1 + 1 + 2, 1),
}


def snapshot(name: str, tokens: str = "equal") -> GraphSnapshot:
    wide = {"v_head_dim": 20, "num_hidden_layers": 3}
    model = zoo.build(name, **(wide if name == "deepseek_v3" else {}))
    ids = torch.randint(0, 160, (2, 7))
    (graph,) = fgtp_pass.snapshot_graphs(
        model,
        kwargs={"input_ids": ids, "use_cache": False},
        finegrained_tp_config={k: v for k, v in sizes(2).items() if k[:3] not in missing(name)},
        data_parallel_size=4,
        rank=1,
        tokens=tokens,
    )
    return graph


@pytest.mark.parametrize("name", list(COUNTS))
def test_graphs_are_as_pinned(name: str, ranks: Pools, request: pytest.FixtureRequest) -> None:
    # in a process of its own: what ran before can change how a model builds its masks
    (graph,) = ranks(1).run(snapshot, name)
    for when, text in (("before", graph.before), ("after", graph.after)):
        path = FOLDER / f"{name}.{when}.txt"
        if request.config.getoption("--update-snapshots"):
            FOLDER.mkdir(exist_ok=True)
            path.write_text(text)
        assert path.read_text() == text, f"{path.name} changed; if meant, run make snapshots"


@pytest.mark.parametrize("name", list(COUNTS))
def test_exact_number_of_each_collective(name: str) -> None:
    graph = snapshot(name)
    ops = Counter(
        kind
        for line in graph.after.splitlines()
        for kind, op in KINDS.items()
        if f"::{op}(" in line
    )
    assert tuple(ops[kind] for kind in KINDS) == COUNTS[name]
    assert ops == graph.collectives
    assert "_c10d_functional" not in graph.before


def test_ragged_adds_one_row_count_per_component() -> None:
    added = [line for line in snapshot("llama", "ragged").after.splitlines() if "fgtp_rows" in line]
    assert sum(line.startswith("input ") for line in added) == 4


def test_graph_of_the_o_proj_uses_the_path_with_fewer_bytes() -> None:
    wide = zoo.build("deepseek_v3", v_head_dim=20)  # 4 heads x 20 > 64
    narrow = zoo.build("deepseek_v3", v_head_dim=12)  # 4 heads x 12 < 64
    paths = []
    for model in (wide, narrow):
        plan = fgtp_pass.make_plan(
            model,
            kwargs={"input_ids": torch.zeros(1, 4, dtype=torch.long)},
            finegrained_tp_config=sizes(oproj=2),
            data_parallel_size=2,
        )
        paths += {site.collectives for site in plan.sites}
    assert paths == [("all_to_all", "reduce_scatter"), ("all_gather", "all_to_all")]

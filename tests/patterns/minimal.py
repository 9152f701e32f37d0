"""The smallest model that has a component, its graph before and after the pass in one file."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fgtp_pass


def check_graphs(
    test_file: str,
    model: nn.Module,
    example: torch.Tensor,
    update: bool,
    of: str = "",
    components: tuple[str, ...] = (),
) -> None:
    """Compare the model's graph on rank 0 of 2 with BEFORE and AFTER of `test_file`.

    With `update`, rewrite these in the file. of: what their names begin with. components: those to
    be on, by default the usual ones.
    """
    sizes = {f"{name}_tensor_parallel_size": 2 for name in components} or None
    (graph,) = fgtp_pass.snapshot_graphs(
        model.eval(), (example,), data_parallel_size=2, finegrained_tp_config=sizes
    )
    path = Path(test_file)
    source = path.read_text()
    for name, text in ((f"{of}BEFORE", graph.before), (f"{of}AFTER", graph.after)):
        pinned = re.search(rf'^{name} = """\\\n(.*?)^"""', source, re.MULTILINE | re.DOTALL)
        assert pinned, f"{path.name} has no {name}"
        if update:
            source = source[: pinned.start(1)] + text + source[pinned.end(1) :]
            path.write_text(source)
        else:
            assert pinned[1] == text, f"{path.name} changed; if meant, run make snapshots"


def linear(*features: int) -> Any:
    return nn.Linear(*features, bias=False)

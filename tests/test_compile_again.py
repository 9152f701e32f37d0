"""dynamo.compile_again: what Dynamo traced once, or was written of it, traced anew."""

import logging
from typing import Any

import pytest
import torch
from marks import quick
from torch import fx

from fgtp_pass.dynamo import compile_again

pytestmark = quick


def _graph(target: Any, *more: Any) -> fx.GraphModule:
    """x, n -> x times `target` of n."""
    graph = fx.Graph()
    x, n = graph.placeholder("x"), graph.placeholder("n")
    given = graph.call_function(target, ([n, *more],) if more else (n,))
    graph.output((graph.call_function(torch.mul, (x, given)),))
    return fx.GraphModule(torch.nn.Module(), graph)


def _compiled(module: fx.GraphModule) -> tuple[Any, list[int]]:
    compiles: list[int] = []

    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        compiles.append(1)
        return gm.forward

    return compile_again(module, backend), compiles


def test_arithmetic_on_sizes_is_traced_where_they_are_plain_numbers() -> None:
    run, compiles = _compiled(_graph(torch.sym_sum, 2))
    assert [run(torch.ones(1), n)[0].item() for n in (3, 5)] == [5.0, 7.0]
    assert compiles


def _untraceable(n: int) -> int:
    torch._dynamo.graph_break()
    return n + 1


def test_a_graph_that_cannot_be_traced_runs_as_it_is_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    run, compiles = _compiled(_graph(_untraceable))
    with caplog.at_level(logging.WARNING, logger="fgtp_pass"):
        assert [run(torch.ones(1), n)[0].item() for n in (3, 5)] == [4.0, 6.0]
    assert not compiles
    assert sum("this graph runs uncompiled" in line for line in caplog.messages) == 1


def test_an_error_of_the_inner_backend_is_raised() -> None:
    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        raise RuntimeError("no compiler here")

    run = compile_again(_graph(torch.sym_sum, 2), backend)
    with pytest.raises(Exception, match="no compiler here"):
        run(torch.ones(1), 3)

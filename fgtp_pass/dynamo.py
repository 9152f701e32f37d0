"""What the pass needs of torch's compiler beyond its public interface, in one place.

Private names used: `Node._dynamo_source` (where an input comes from), `Node.meta["example_value"]`
(its fake value), `ShapeEnv.guards`, `torch._C._set_throw_on_mutable_data_ptr`, the setting
`meta_nonzero_assume_all_nonzero`, the recompile limits, `torch.utils._sympy.interp`,
`torch._dynamo.exc.Unsupported`; and in `vllm/by_tokens.py`, for the torch that vLLM comes with,
`torch._dynamo.aot_compile_types`. Checked with torch 2.11 to 2.13.
"""

import gc
import logging
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import sympy
import torch
from torch import fx
from torch._dynamo.source import ConstantSource
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental import _config as experimental_config
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.fx.proxy import GraphAppendingTracer, Proxy
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

log = logging.getLogger("fgtp_pass")


@contextmanager
def paused_garbage_collection() -> Iterator[None]:
    """For code that makes many nodes and drops none: collecting would walk all of them often."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def meta_constants() -> Iterator[None]:
    """Let models on the meta device make constants while Dynamo traces them.

    `torch.tensor(0.0, device="meta")` gives a real meta tensor even under Dynamo's fake mode,
    which then refuses to mix the two unless it is made to convert them.
    """
    init = FakeTensorMode.__init__

    def lenient(self: FakeTensorMode, **options: Any) -> None:
        init(self, **{**options, "allow_non_fake_inputs": True})

    with mock.patch.object(FakeTensorMode, "__init__", lenient):
        yield


@contextmanager
def meta_nonzero() -> Iterator[None]:
    """Let models on the meta device ask which elements are not zero: all of them."""
    settings: Any = experimental_config
    with settings.patch(meta_nonzero_assume_all_nonzero=True):
        yield


@contextmanager
def no_recompile_limit() -> Iterator[None]:
    """Let Dynamo trace one piece of code for any number of models; else it gives up after some."""
    limits = ("recompile_limit", "accumulated_recompile_limit")
    with torch._dynamo.config.patch(dict.fromkeys(limits, 1 << 20)):
        yield


@contextmanager
def no_function_modes() -> Iterator[None]:
    """Without the modes that a caller has entered, such as `with torch.device("cpu"):`.

    Dynamo traces into them, which some methods of tensors (unflatten) do not survive.
    """
    count = torch._C._len_torch_function_stack()
    modes = [torch._C._pop_torch_function_stack() for _ in range(count)]
    try:
        yield
    finally:
        for mode in reversed(modes):
            torch._C._push_on_torch_function_stack(mode)


def refuse_data_pointer(tensor: torch.Tensor) -> None:
    """Let whoever asks for the address of the data (`to_dlpack`) get an error, not a null."""
    refuse = getattr(torch._C, "_set_throw_on_mutable_data_ptr", None)
    if refuse is not None:
        refuse(tensor)


def recorded_fake_mode(graph: fx.Graph) -> FakeTensorMode:
    """The mode of the values that Dynamo recorded; the tracing context has another one."""
    for node in graph.nodes:
        value = node.meta.get("example_value")
        if isinstance(value, FakeTensor):
            return value.fake_mode
    raise AssertionError("Dynamo records fake values on every graph")


def forget_values(graph: fx.Graph) -> None:
    """Drop the fake values of a graph that is compiled.

    Dynamo keeps what it compiled for as long as the process lives, and drops those of its own.
    """
    for node in graph.nodes:
        for kept in ("example_value", "val", "grapharg"):
            node.meta.pop(kept, None)


class _Emitting(GraphAppendingTracer):
    def __init__(self, graph: fx.Graph, emit: Callable[..., fx.Node]):
        super().__init__(graph)
        self._emit = emit

    def create_node(self, kind: str, target: Any, args: Any, kwargs: Any, *_: Any) -> fx.Node:
        return self._emit(target, *args, **kwargs)


def emit_size(
    emit: Callable[..., fx.Node], size: torch.SymInt, nodes: Mapping[sympy.Symbol, fx.Node]
) -> fx.Node:
    """A node that computes a size. nodes: those that hold the symbols it is made of."""
    expression: Any = size.node.expr
    tracer = _Emitting(next(iter(nodes.values())).graph, emit)
    held = {symbol: Proxy(node, tracer) for symbol, node in nodes.items()}
    computed: Proxy = sympy_interp(PythonReferenceAnalysis, held, expression)
    return computed.node


def copy_source(source: fx.Node, target: fx.Node) -> None:
    """Let `target` stand for the same input; backends look their inputs up by it."""
    if hasattr(source, "_dynamo_source"):
        target._dynamo_source = source._dynamo_source


def add_size_input(
    graph: fx.Graph, mode: FakeTensorMode, name: str, example: torch.Tensor
) -> fx.Node:
    """A new placeholder for tensors of shape [n, 0], where n >= 2 is a symbol of its own."""
    node = graph.placeholder(name)
    node._dynamo_source = ConstantSource(name)
    node.meta["example_value"] = _fake_size_input(mode, name, example)
    return node


def _fake_size_input(mode: FakeTensorMode, name: str, example: torch.Tensor) -> FakeTensor:
    fake: FakeTensor = mode.from_tensor(
        example,
        symbolic_context=StatelessSymbolicContext(
            dynamic_sizes=[DimDynamic.DYNAMIC, DimDynamic.STATIC]
        ),
        source=ConstantSource(name),
    )
    return fake


# what Dynamo writes for arithmetic on symbols, and cannot trace where these are plain numbers
_PYTHON: Mapping[Any, Callable[..., Any]] = {
    torch.sym_sum: sum,
    torch.sym_max: max,
    torch.sym_min: min,
    torch.sym_float: float,
    torch.sym_int: int,
    torch.sym_not: operator.not_,
}


def compile_again(module: fx.GraphModule, backend: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a graph that Dynamo traced before, or that was written of one: by tracing it anew.

    A graph that Dynamo cannot trace a second time runs as it is, with a warning.
    """
    uncompiled = as_it_is(module)
    compiled = torch.compile(module, backend=backend, fullgraph=True)

    def run(*inputs: Any) -> Any:
        nonlocal compiled
        try:
            return compiled(*inputs)
        except torch._dynamo.exc.Unsupported as error:
            log.warning("this graph runs uncompiled, since Dynamo cannot trace it again: %s", error)
            compiled = uncompiled
            return compiled(*inputs)

    return run


def as_it_is(module: fx.GraphModule) -> Callable[..., Any]:
    """A graph that Dynamo traced before, or that was written of one, to be run op by op."""
    for node in module.graph.nodes:
        node.target = _PYTHON.get(node.target, node.target)
    module.recompile()
    forward: Callable[..., Any] = module.forward
    return forward


@dataclass(frozen=True)
class SizeGuard:
    """A condition on input sizes; `numbers` says which symbols are which of the new inputs."""

    condition: sympy.Basic
    numbers: Mapping[sympy.Symbol, int]


@contextmanager
def new_inputs(
    static: Sequence[torch.Tensor], sizes: Sequence[torch.Tensor], written: Sequence[fx.Node]
) -> Iterator[list[SizeGuard]]:
    """Tell the backend's tracing about inputs that Dynamo did not hand out.

    static: tensors whose shapes never change. sizes: inputs as `add_size_input` makes them, and
    `written`, their placeholders. Gives a list that holds, at the end, the guards that were put
    on these sizes: Dynamo does not know the inputs and could not check them, so whoever passes
    the sizes must.
    """
    mode, guards = detect_fake_mode(), list[SizeGuard]()
    if mode is None or mode.shape_env is None:
        yield guards
        return
    # The mode knows a real tensor again for as long as its fake lives.
    fakes = [mode.from_tensor(tensor, static_shapes=True) for tensor in static]
    size_fakes = [_fake_size_input(mode, f"fgtp_rows_{i}", t) for i, t in enumerate(sizes)]
    yield guards
    numbers = {
        fake.shape[0].node.expr: number
        for values in (size_fakes, [node.meta["example_value"] for node in written])
        for number, fake in enumerate(values)
    }
    guards += [SizeGuard(expr, numbers) for expr in _take_guards(mode.shape_env, set(numbers))]
    del fakes


def forget_guards(written: Sequence[fx.Node]) -> None:
    """Forget those on sizes that `add_size_input` made, for a graph that is not compiled."""
    for node in written:
        value = node.meta["example_value"]
        _take_guards(value.fake_mode.shape_env, {value.shape[0].node.expr})


def _take_guards(shape_env: ShapeEnv, symbols: set[sympy.Symbol]) -> list[sympy.Basic]:
    """Remove the guards on any of `symbols`; returns them."""
    taken = [guard for guard in shape_env.guards if guard.expr.free_symbols & symbols]
    shape_env.guards = [guard for guard in shape_env.guards if guard not in taken]
    return [guard.expr for guard in taken]

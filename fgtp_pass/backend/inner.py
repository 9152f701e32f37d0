"""The inner backend, which compiles the rewritten graph."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import fx

from fgtp_pass import dynamo
from fgtp_pass.options.options import Options

Compiled = Callable[..., Any]


def compile_inner(options: Options, gm: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
    """Compile with the inner backend."""
    backend = options.inner_backend
    extra: dict[str, Any] = {}
    if options.inner_options:
        by_name = backend == "inductor"
        extra = {"config_patches" if by_name else "options": options.inner_options}
    if isinstance(backend, str):
        backend = torch._dynamo.lookup_backend(backend)
    compiled: Compiled = backend(gm, list(inputs), **extra)
    return compiled


def compile_later(options: Options, gm: fx.GraphModule) -> Compiled:
    """Compile with the inner backend when Dynamo's own tracing of the graph is over.

    Dynamo then traces it a second time, and guards it, unless the backend runs what it is given.
    """
    if options.inner_backend == "eager":
        return dynamo.as_it_is(gm)
    return dynamo.compile_again(gm, partial(compile_inner, options))

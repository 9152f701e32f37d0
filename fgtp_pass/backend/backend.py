"""`fgtp_backend`: checks what it is given and hands the graph to the runtime of its options."""

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import fx, nn

from fgtp_pass.agreement.control_group import ControlGroup, all_ranks, report_failure
from fgtp_pass.agreement.hosts import ranks_on_smallest_host
from fgtp_pass.backend.inner import Compiled, compile_inner
from fgtp_pass.backend.runtime import Runtime
from fgtp_pass.collectives.groups import DataParallelGroup, data_parallel_group
from fgtp_pass.errors import ConfigError, FgtpError, InferenceOnlyError
from fgtp_pass.options.options import Options, parse_options
from fgtp_pass.versions import check_torch
from fgtp_pass.weights.shard import read_parameters


def fgtp_backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    **others: Any,
) -> Compiled:
    """Backend of `torch.compile`: shards what it finds in the graph over data-parallel ranks.

    options: see `fgtp_pass.options.options.Options`. With no component to shard, or a group of one
    rank, the graph goes to the inner backend as it came.

    Raises, before any weight is touched: ConfigError, DetectionError, InferenceOnlyError, and
    AgreementError when the ranks of the group do not agree.
    """
    parameters = [v for v in example_inputs if isinstance(v, nn.Parameter)]
    try:
        check_torch()
        _check_arguments(others)
        parsed = parse_options(options)
        _check_inference(parameters)
    except FgtpError as error:
        if parameters:
            _report_early_failure(options, error)
        raise
    if not parameters or not _has_group(parsed):
        read_parameters(parameters)
        return compile_inner(parsed, gm, example_inputs)
    return _runtime(parsed).compile(gm, example_inputs)


def _check_arguments(others: Mapping[str, Any]) -> None:
    """`torch.compile` hands its `mode` to a backend, which is Inductor's to understand."""
    for name, value in others.items():
        instead = ""
        if name == "mode":
            known = torch._inductor.list_mode_options()
            instead = f" Use options={{'inner_options': {known.get(value, {})!r}}} for it."
        raise ConfigError(
            f"torch.compile(..., {name}={value!r}) is for Inductor alone, and fgtp_backend comes "
            f"before it.{instead}"
        )


def data_parallel_of(options: Mapping[str, Any] | None) -> DataParallelGroup | None:
    """The data-parallel group that the backend takes with these options, None for a single rank.

    Collective. Raises ConfigError, on all ranks, for options that are wrong.
    """
    try:
        parsed = parse_options(options)
    except FgtpError as error:
        _report_early_failure(options, error)
        raise
    return _data_parallel(parsed) if _has_group(parsed) else None


def _check_inference(parameters: Sequence[nn.Parameter]) -> None:
    if torch.is_grad_enabled() and any(p.requires_grad for p in parameters):
        raise InferenceOnlyError(
            "fgtp_pass is inference only, and gradients are enabled. Call the compiled model "
            "under torch.no_grad() or torch.inference_mode(), or freeze its parameters."
        )


def _has_group(options: Options) -> bool:
    """Whether there are other data-parallel ranks. Raises ConfigError if sizes need them."""
    requested = options.sizes.requested
    if not dist.is_initialized():
        if requested:
            raise ConfigError(
                f"{', '.join(requested)}: group sizes > 1 need a process group, and there is "
                "none. Call torch.distributed.init_process_group before the first step."
            )
        return False
    size = _data_parallel(options).size
    if size == 1:
        options.sizes.resolve(1, 1)  # raises for a size that exceeds the group
    return size > 1


def _data_parallel(options: Options) -> DataParallelGroup:
    """The data-parallel group. The first use is collective, whatever the ranks' options."""
    group = data_parallel_group(options.process_group, timedelta(seconds=options.timeout_seconds))
    ranks_on_smallest_host(group)
    return group


def _report_early_failure(options: Mapping[str, Any] | None, error: Exception) -> None:
    """Tell the group about options that this rank cannot even read."""
    if dist.is_initialized():
        given = {k: v for k, v in (options or {}).items() if k in ("process_group",)}
        group = _data_parallel(Options(**given))
        if group.size > 1:
            # where the ranks run in step, they come there first (see Runtime)
            steps = [ControlGroup(group, size) for size in sorted(group.run_in_step)]
            report_failure(steps[0] if steps else all_ranks(group), error)


_runtimes: list[Runtime] = []  # in the order of their making, which is the same on all ranks


def _runtime(options: Options) -> Runtime:
    """The runtime of these options in this process; making one is collective."""
    group = _data_parallel(options)
    _runtimes[:] = [runtime for runtime in _runtimes if runtime.group.is_alive]
    for runtime in _runtimes:
        if runtime.group is group and runtime.options == options:
            return runtime
    _runtimes.append(Runtime(options, group))
    return _runtimes[-1]

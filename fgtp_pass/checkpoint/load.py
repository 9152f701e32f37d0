"""`load_checkpoint`: a model is read in shards, and is never whole on any rank."""

import hashlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from torch.utils._pytree import tree_iter

from fgtp_pass.agreement.control_group import all_ranks, reporting_failure
from fgtp_pass.backend.backend import data_parallel_of, fgtp_backend
from fgtp_pass.checkpoint import hugging_face
from fgtp_pass.checkpoint.empty_model import drop_parameters, fill_buffers, replace_parameters
from fgtp_pass.checkpoint.exchange import checked_source, exchange
from fgtp_pass.checkpoint.files import Checkpoint, open_checkpoint
from fgtp_pass.checkpoint.names import Found, match_names, tensor_names
from fgtp_pass.checkpoint.same_weights import require_equal_sums, sampled_sums
from fgtp_pass.checkpoint.sources import BroadcastSource, TensorSource
from fgtp_pass.plan.plan import format_bytes
from fgtp_pass.weights.shard import read_parameters
from fgtp_pass.weights.unread_parameter import WeightSource, unread

log = logging.getLogger("fgtp_pass")

Model = TypeVar("Model", bound=nn.Module)


def load_checkpoint(
    model: Model,
    path: str | Path,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    source: Literal["local", "rank0"] = "local",
    options: Mapping[str, Any] | None = None,
) -> Model:
    """Compile a model with `fgtp_backend`, and read of each weight the part that this rank keeps.

    model: with parameters on the meta device (`init_empty_weights`); weights that it has are
    dropped. path: a safetensors file, a folder of Hugging Face, of `save_checkpoint` or of torch's
    distributed checkpoint. args, kwargs: a call of the model, which is run once: its graphs say
    what is cut. device: of the weights, by default that of the call's first tensor. dtype: of the
    weights, by default the model's own. source: "local", each rank reads its own path; "rank0",
    rank 0 alone has one, and sends the parts. options: the backend's.

    Returns the model, compiled in place. Collective. Raises CheckpointError, or what the backend
    raises, on all ranks; the model is then without weights and has to be loaded again.
    """
    group = data_parallel_of(options)
    control = all_ranks(group) if group is not None else None
    started = time.monotonic()
    with reporting_failure(control):
        sender = group if checked_source(source) == "rank0" else None
        reads = sender is None or sender.rank == 0
        checkpoint = open_checkpoint(Path(path)) if reads else None
        found = _found(model, checkpoint) if checkpoint is not None else {}
    known = list(found)
    if control is not None:
        known = exchange(control, known)[0] if sender is not None else known
        weights = _digest(model, known)
        control.require_equal({"source": source, "dtype": str(dtype), "weights to load": weights})
    on = torch.device(device) if device is not None else _device_of(args, kwargs)

    def source_of(name: str, value: torch.Tensor) -> WeightSource | None:
        if name not in known:
            return None  # a buffer, which is computed
        wanted = _dtype(model, name, value, dtype)
        local = TensorSource(name, wanted, on, found[name]) if reads else None
        if sender is not None:
            return BroadcastSource(name, wanted, on, value.shape, sender, local)
        return local

    try:
        with reporting_failure(control):
            drop_parameters(model)
            _attach(model, source_of, on)
            model.compile(backend=fgtp_backend, options=dict(options or {}))
            with torch.no_grad():
                model(*args, **(kwargs or {}))
            read_parameters(model.parameters())  # those in no graph of this call
        if control is not None:
            require_equal_sums(control, sampled_sums(model))
    except Exception:
        drop_parameters(model)
        raise
    if checkpoint is not None and (group is None or group.rank == 0):
        count, seconds = format_bytes(checkpoint.count.bytes), time.monotonic() - started
        log.info("%s: read %s, and compiled, in %.1f s", path, count, seconds)
    return model


def _found(model: nn.Module, checkpoint: Checkpoint) -> dict[str, Found]:
    """What the checkpoint has, by the first name of each weight."""
    names = tensor_names(model)
    return {names[value][0]: found for value, found in match_names(model, checkpoint).items()}


@torch.inference_mode(False)
@torch.no_grad()
def _attach(
    model: nn.Module,
    source_of: Callable[[str, torch.Tensor], WeightSource | None],
    device: torch.device,
) -> None:
    """Put unread parameters into the place of those there, and real buffers."""
    parameters: dict[torch.Tensor, nn.Parameter] = {}
    buffers: dict[torch.Tensor, torch.Tensor] = {}
    for value, names in tensor_names(model).items():
        source = source_of(names[0], value)
        if source is None:
            continue
        if isinstance(value, nn.Parameter):
            parameters[value] = unread(value, source, device)
        else:
            buffers[value] = source.whole()
    replace_parameters(model, parameters)
    fill_buffers(model, buffers, device)


def _digest(model: nn.Module, known: Sequence[str]) -> str:
    """Equal on two ranks whose models have the same weights and find the same in the checkpoint."""
    named = {names[0]: list(value.shape) for value, names in tensor_names(model).items()}
    weights = [f"{name} {shape} {name in known}" for name, shape in named.items()]
    return hashlib.sha256("\n".join(weights).encode()).hexdigest()[:16]


def _device_of(args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> torch.device:
    tensors = (v for v in tree_iter((args, kwargs)) if isinstance(v, torch.Tensor))
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def _dtype(
    model: nn.Module, name: str, value: torch.Tensor, wanted: torch.dtype | None
) -> torch.dtype:
    """The dtype of a weight: the model's, or the wanted one as `from_pretrained` takes it."""
    if wanted is None or not value.is_floating_point() or not isinstance(value, nn.Parameter):
        return value.dtype
    if hugging_face.is_pretrained_model(model):
        return torch.float32 if hugging_face.stays_float32(model, name, wanted) else wanted
    return wanted

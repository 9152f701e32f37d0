"""What a rank does with a case: the plain model, the sharded one, and whether they agree."""

import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from fuzz.grammar import Case
from fuzz.source import build
from torch import nn
from torch.utils._pytree import tree_leaves

import fgtp_pass

COMPONENTS = ("embedding", "lmhead", "oproj", "mlp")
OPT_IN = ("sharedexpert", "qkv")
TOLERANCE = {"float64": 1e-9, "float32": 2e-4}
PATIENCE = 60.0  # seconds that a rank waits for the others

_subgroups: dict[int, Any] = {}


@dataclass(frozen=True)
class Verdict:
    """What came of a case on one rank.

    invalid: why the plain model does not run, if it does not. wrong: what is wrong with the sharded
    one, if anything is. sites: how many of each component were cut.
    """

    invalid: str = ""
    wrong: str = ""
    sites: tuple[tuple[str, int], ...] = ()


def judge(case: Case) -> Verdict:
    """Collective over all ranks of the pool, of which the first `case.ranks` have the case."""
    logging.disable(logging.WARNING)
    rank = dist.get_rank()
    group = _subgroup(case.ranks)
    if rank >= case.ranks:
        return Verdict()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            want = list(_run(case, rank, build(case.program)))
            said = ""
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
        problems: list[Any] = [None] * case.ranks
        dist.all_gather_object(problems, said, group=group)
        if any(problems):
            return Verdict(invalid=next(filter(None, problems)))
        verdict = _sharded(case, rank, group, want)
        dist.all_gather_object(problems, verdict.wrong, group=group)
        if any(problems) and not _compiles(case, rank):
            return Verdict(invalid="torch.compile does not take it")
    return verdict


def _subgroup(ranks: int) -> Any:
    """Collective when new: the first ranks of the world."""
    if ranks == dist.get_world_size():
        return dist.group.WORLD
    if ranks not in _subgroups:
        _subgroups[ranks] = dist.new_group(list(range(ranks)))
    return _subgroups[ranks]


def _ids(case: Case, call: int, rank: int) -> torch.Tensor | None:
    shape = case.shape(call, rank)
    if shape is None:
        return None
    generator = torch.Generator().manual_seed(10 * call + rank)
    return torch.randint(50, shape, generator=generator)


@torch.no_grad()
def _run(case: Case, rank: int, model: Any, idle: Any = None) -> Iterator[list[Any]]:
    """By call, what the model returns, in leaves, and what it made of its input."""
    for call in range(len(case.calls)):
        ids = _ids(case, call, rank)
        if ids is not None:
            yield [*tree_leaves(model(ids)), ids]
            continue
        if idle is not None:
            idle()
        yield []


def _sharded(case: Case, rank: int, group: Any, want: list[list[Any]]) -> Verdict:
    model = build(case.program)
    before = {name: value.clone() for name, value in model.named_parameters()}
    fast = _compile(model, case, fgtp_pass.fgtp_backend, _options(case, group))

    def idle() -> None:
        if fgtp_pass.applied_plan(model) is not None:
            fgtp_pass.idle_step(fast)

    wrong = ""
    try:
        for call, got in enumerate(_run(case, rank, fast, idle)):
            worst = _difference(want[call], got)
            if not worst <= TOLERANCE[case.program.dtype]:
                wrong = wrong or f"call {call}: off by {worst:.3g}"
        plan = fgtp_pass.applied_plan(model)
        fgtp_pass.unshard(fast)
    except Exception as error:
        return Verdict(wrong=f"{type(error).__name__}: {error}")
    for name, value in model.named_parameters():
        if not torch.equal(value, before[name]):
            wrong = wrong or f"{name} came back changed"
    sites = Counter(site.component for site in plan.sites) if plan else Counter[str]()
    return Verdict(wrong=wrong, sites=tuple(sorted(sites.items())))


def _options(case: Case, group: Any) -> dict[str, Any]:
    components = COMPONENTS + OPT_IN if case.six else COMPONENTS
    return {
        "finegrained_tp_config": {f"{c}_tensor_parallel_size": case.ranks for c in components},
        "allow_missing": list(components),
        "tokens": case.contract,
        "inner_backend": case.inner,
        "process_group": group,
        "timeout_seconds": PATIENCE,
    }


def _compile(model: nn.Module, case: Case, backend: Any, options: Any = None) -> Any:
    return torch.compile(model, backend=backend, options=options, dynamic=case.dynamic)


def _compiles(case: Case, rank: int) -> bool:
    """Whether torch.compile alone gives what the plain model does."""
    torch._dynamo.reset()
    try:
        for _ in _run(case, rank, _compile(build(case.program), case, case.inner)):
            pass
    except Exception:
        return False
    return True


def _difference(want: list[Any], got: list[Any]) -> float:
    """The largest error, relative to the largest value; infinite where kinds or shapes differ."""
    if len(want) != len(got):
        return float("inf")
    worst = 0.0
    for one, other in zip(want, got, strict=True):
        if one.shape != other.shape or one.dtype is not other.dtype:
            return float("inf")
        one, other = one.double(), other.double()
        if not torch.equal(one.isnan(), other.isnan()):
            return float("inf")
        one, other = one.nan_to_num(), other.nan_to_num()
        if one.numel():
            worst = max(worst, float((one - other).abs().max() / (one.abs().max() + 1e-30)))
    return worst

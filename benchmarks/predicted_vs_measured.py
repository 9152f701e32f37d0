"""What the cost model predicts for a decode step on this machine, against what is measured.

The model, ranks and timing are those of decode_step.py. At each token count both ranks first
calibrate, at the priority at which they are timed: memory bandwidth, matmul rate and collectives.
(A shared machine has another speed from minute to minute, which is no error of the model.) Then
each component by itself, and all together, are sharded in turn and timed against plain data
parallelism, interleaved. All linears that are not sharded are packed like shards, on both sides, so
that a change is due to sharding and not to another matmul (decode_step.py measures that). Token
counts are not checked at run time (check_tokens=False), so that a step's collectives are those of
the plan.

The control `none` times two equal models. They differ by one to two milliseconds, since they lie
at different places in memory; what it shows at a token count is taken off the changes there.
`agrees` compares signs of the predicted and the measured change. A measured change counts only if
it exceeds its spread: the p10 to p90 range of the differences between neighbouring steps does not
contain zero. `error` is |predicted - measured| / measured of the whole step; the error of the
changes that count is given too, since sizes are chosen by the change.
"""

import statistics
import warnings
from datetime import timedelta
from typing import Any

import decode_step
import torch
import torch.distributed as dist
from common import (
    add_realtime,
    integers,
    interleave,
    machine,
    parser,
    realtime,
    report,
    run_ranks,
    slower_rank,
    spread,
)

import fgtp_pass
from fgtp_pass.calibration.measure import measure
from fgtp_pass.collectives.groups import data_parallel_group
from fgtp_pass.cost.estimate import Cluster, step_seconds
from fgtp_pass.cost.hardware import Hardware
from fgtp_pass.cost.shape import component_shapes
from fgtp_pass.plan.plan import Plan
from fgtp_pass.weights import packing

WORLD, COMPONENTS = decode_step.WORLD, decode_step.COMPONENTS
# a part of the names of each component's linears, in this one model
_MODULES = {"embedding": "no linear", "lmhead": "lm_head", "oproj": "o_proj", "mlp": ".mlp."}
# "none" is the control: two equal models, so that what it measures is the benchmark's own bias
VARIANTS = {"none": ()} | {name: (name,) for name in COMPONENTS} | {"all": COMPONENTS}


@torch.no_grad()
def rank_main(
    shape: dict[str, int], counts: list[int], repetitions: int, at_realtime: bool
) -> dict[str, Any]:
    """On every rank: calibrations by count, plans by variant, times by count and variant."""
    torch._inductor.config.compile_threads = 1
    warnings.filterwarnings("ignore")
    group = data_parallel_group(None, timedelta(seconds=300))
    whole = decode_step.pack_linears(decode_step.build(shape, torch.float32))
    cut = decode_step.build(shape, torch.float32)
    linears = {n: m for n, m in cut.named_modules() if isinstance(m, torch.nn.Linear)}
    plans: dict[str, Plan] = {}
    results, profiles = [], []
    for count in counts:
        torch._dynamo.reset()
        with realtime(at_realtime):
            profiles.append(measure(group, torch.device("cpu"), [torch.float32]).model_dump_json())
        generator = torch.Generator().manual_seed(100 + dist.get_rank())
        ids = torch.randint(0, shape["vocab_size"], (count, 1), generator=generator)
        plain = decode_step.decoder(torch.compile(whole, dynamic=False), whole.config, ids)
        want = plain()
        for name, components in VARIANTS.items():
            left = [m for n, m in linears.items() if not any(_MODULES[c] in n for c in components)]
            for module in left:
                packing.pack(module.weight)
                module.__class__ = decode_step.PackedLinear
            step = decode_step.decoder(_compiled(cut, components), cut.config, ids)
            error = decode_step.difference(step(), want)
            assert error < decode_step.TOLERANCE["float32"], f"logits differ by {error}"
            if components:
                plan = fgtp_pass.applied_plan(cut)
                assert plan is not None
                plans[name] = plan
            pair = {"dp": plain, "pass": step}
            times = interleave(pair, repetitions, 3, dist.barrier, at_realtime)
            results.append({"tokens": count, "variant": name, "times": times})
            if components:
                fgtp_pass.unshard(cut)
            for module in left:
                packing.unpack(module.weight)
                module.__class__ = torch.nn.Linear
    sharded = plans["all"].cuts().keys()
    rest = [m.weight.numel() for n, m in linears.items() if f"{n}.weight" not in sharded]
    return {
        "hardware": dict(zip(counts, profiles, strict=True)),
        "plans": {name: plan.to_json() for name, plan in plans.items()},
        "linears": sum(rest),
        "results": results,
    }


def _compiled(model: torch.nn.Module, components: tuple[str, ...]) -> Any:
    if not components:
        return torch.compile(model, dynamic=False)
    config = {f"{component}_tensor_parallel_size": WORLD for component in components}
    options = {"finegrained_tp_config": config, "check_tokens": False}
    return torch.compile(model, backend=fgtp_pass.fgtp_backend, options=options, dynamic=False)


def compare(per_rank: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Predicted and measured milliseconds by token count and variant."""
    first = per_rank[0]
    clusters = {
        count: Cluster(Hardware.model_validate_json(profile), WORLD, WORLD)
        for count, profile in first["hardware"].items()
    }
    # of each variant the plan that ran: sites that touch share messages where both are on
    shapes = {
        name: component_shapes(Plan.from_json(plan), "float32")
        for name, plan in first["plans"].items()
    }
    compared: list[dict[str, Any]] = []
    bias = 0.0
    for together in zip(*(one["results"] for one in per_rank), strict=True):
        tokens, variant = together[0]["tokens"], together[0]["variant"]
        times = slower_rank([one["times"] for one in together])
        differences = [a - b for a, b in zip(times["pass"], times["dp"], strict=True)]
        if variant == "none":
            bias = statistics.median(differences)
        else:
            differences = [difference - bias for difference in differences]
        sizes = dict.fromkeys(VARIANTS[variant], WORLD)
        predicted = {
            name: 1e3
            * step_seconds(
                shapes["all"] | shapes.get(variant, {}),
                first["linears"],
                clusters[tokens],
                chosen,
                tokens,
            )
            for name, chosen in (("dp", {}), ("pass", sizes))
        }
        measured = {name: spread(values) for name, values in times.items()}
        change = spread(differences)
        predicted_change = predicted["pass"] - predicted["dp"]
        certain = variant != "none" and not change["p10"] <= 0 <= change["p90"]
        compared.append(
            {
                "tokens_per_rank": tokens,
                "variant": variant,
                "measured_ms": measured,
                "measured_change_ms": change,
                "predicted_ms": {name: round(value, 3) for name, value in predicted.items()},
                "predicted_change_ms": round(predicted_change, 3),
                "certain": certain,
                "agrees": predicted_change * change["median"] > 0 if certain else None,
                "error": round(
                    abs(predicted["pass"] / measured["pass"]["median"] - 1),
                    3,
                ),
            }
        )
    return compared


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--tokens", type=integers, default=[1, 2, 4, 8, 16, 32])
    arguments.add_argument("--repetitions", type=int, default=24)
    add_realtime(arguments)
    arguments.add_argument("--tiny", action="store_true", help="a toy model, to try the benchmark")
    given = arguments.parse_args()
    at = machine()
    shape = decode_step.TINY if given.tiny else decode_step.SHAPE
    per_rank = run_ranks(WORLD, rank_main, shape, given.tokens, given.repetitions, given.realtime)
    compared = compare(per_rank)
    decided = [one for one in compared if one["certain"]]
    verdicts = [one["agrees"] for one in decided]
    errors = [
        abs(one["predicted_change_ms"] / one["measured_change_ms"]["median"] - 1) for one in decided
    ]
    summary = {
        "median_error_of_step": statistics.median(one["error"] for one in compared),
        "median_error_of_decided_changes": statistics.median(errors) if errors else None,
        "changes_beyond_their_spread": len(verdicts),
        "of_these_signs_agree": sum(verdicts),
    }
    word = {True: "yes", False: "NO", None: "within spread"}
    report(
        "A decode step, fp32, ms of the slower rank: predicted against measured",
        ["tokens/rank", "sharded", "dp", "predicted", "pass", "predicted", "change [p10-p90]",
         "predicted", "agrees", "error"],
        [
            [
                one["tokens_per_rank"],
                one["variant"],
                one["measured_ms"]["dp"]["median"],
                one["predicted_ms"]["dp"],
                one["measured_ms"]["pass"]["median"],
                one["predicted_ms"]["pass"],
                "{median:+.1f} [{p10:+.1f} {p90:+.1f}]".format(**one["measured_change_ms"]),
                f"{one['predicted_change_ms']:+.1f}",
                word[one["agrees"]],
                f"{one['error']:.0%}",
            ]
            for one in compared
        ],
        {
            "benchmark": "predicted_vs_measured",
            "machine": at | {"realtime": given.realtime},
            "model": shape,
            "calibrations": {
                count: Hardware.model_validate_json(profile).model_dump()
                for count, profile in per_rank[0]["hardware"].items()
            },
            "summary": summary,
            "results": compared,
        },
        given.output,
    )  # fmt: skip
    print(
        f"median error of the step {summary['median_error_of_step']:.0%}, of the decided changes "
        + (f"{statistics.median(errors):.0%}" if errors else "none")
        + "; signs agree in "
        f"{summary['of_these_signs_agree']} of {summary['changes_beyond_their_spread']} changes "
        "beyond their spread"
    )


if __name__ == "__main__":
    main()

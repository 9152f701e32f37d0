"""The layouts of a model on given devices, compared at equal load: which wins, and why."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from fgtp_pass.cost.advice import Choice, Objective, choose_sizes
from fgtp_pass.cost.layout import Deployment, Layout
from fgtp_pass.cost.uncertainty import Predicted, predict
from fgtp_pass.plan.plan import format_bytes


@dataclass(frozen=True)
class Option:
    """A layout, and what it gives.

    sequences: in flight at `tpot` and `throughput`: the load, or the most that a target of TPOT
    allows. tpot: seconds per output token. prefill: seconds to take in a prompt on every
    data-parallel rank. throughput: output tokens per second and device. parts: seconds of a step;
    weights: bytes on a device, by part. cache_bytes: of one sequence on one device. most: sequences
    that fit; throughput_at_most: with as many. choice: why it has its sizes, if it has any.
    """

    layout: Layout
    fits: bool
    meets_target: bool
    sequences: int
    tpot: Predicted
    prefill: float
    throughput: float
    parts: Mapping[str, float]
    weights: Mapping[str, float]
    cache_bytes: float
    most: int
    throughput_at_most: float
    choice: Choice | None = None

    @property
    def name(self) -> str:
        return self.layout.name


@dataclass(frozen=True)
class Comparison:
    """All layouts, best first, and what follows."""

    options: list[Option]
    verdict: str
    target: float | None

    @property
    def best(self) -> Option:
        return self.options[0]

    @property
    def best_fine_grained(self) -> Option | None:
        return next((one for one in self.options if one.layout.fine_grained), None)


def compare(
    deployment: Deployment,
    devices: int,
    objective: Objective = "balanced",
    target: float | None = None,
    asked: Mapping[str, int] | None = None,
) -> Comparison:
    """Every layout of the devices at the deployment's load.

    target: seconds per output token; then layouts rank by the throughput that they reach within it,
    else by TPOT. Those that fit come first. asked: sizes for layouts of one device per rank.
    """
    options = [
        _option(deployment, layout, choice, target)
        for layout, choice in layouts(deployment, devices, objective, target, asked)
    ]
    if target is not None and any(one.meets_target for one in options):
        options.sort(key=lambda o: (not o.meets_target, -o.throughput))
    else:
        options.sort(key=lambda o: (not o.fits, o.tpot.mid))
    return Comparison(options, _verdict(deployment, options, target), target)


def layouts(
    deployment: Deployment,
    devices: int,
    objective: Objective,
    target: float | None = None,
    asked: Mapping[str, int] | None = None,
) -> list[tuple[Layout, Choice | None]]:
    """The layouts worth a look: tensor parallelism of every degree that a node and the heads allow,
    as replicas, with experts over all ranks, and with fine-grained sizes; pipeline stages where no
    replica fits otherwise.
    """
    found: list[tuple[Layout, Choice | None]] = []
    for cut in tensor_parallel_sizes(deployment, devices):
        ranks = devices // cut
        found.append((Layout(cut, ranks), None))
        with_experts = deployment.summary.experts is not None
        if with_experts and ranks > 1:
            found.append((Layout(cut, ranks, expert_parallel=True), None))
        if ranks > 1:
            base = Layout(cut, ranks, expert_parallel=with_experts)
            if asked is not None and cut == 1:
                fine, choice = replace(base, sizes=asked), None
            elif target is None:
                fine, choice = fine_grained(deployment, base, objective)
            else:
                fine, choice = fine_grained_within(deployment, base, objective, target)
            if fine.fine_grained:
                found.append((fine, choice))
    sequences = deployment.load.sequences
    if not any(deployment.fits(layout, sequences) for layout, _ in found if not layout.sizes):
        found += [(layout, None) for layout in _pipelines(deployment, devices)]
    return found


def tensor_parallel_sizes(deployment: Deployment, devices: int) -> list[int]:
    """Powers of two that divide the devices and the attention heads, and stay within a node."""
    limit = min(devices, deployment.devices_per_node)
    powers = [2**i for i in range(limit.bit_length()) if 2**i <= limit]
    heads = deployment.summary.attention_heads
    return [k for k in powers if devices % k == 0 and heads % k == 0]


def fine_grained(
    deployment: Deployment, base: Layout, objective: Objective
) -> tuple[Layout, Choice]:
    """A layout with sizes for the deployment's load, enough to make it fit if any are."""
    sequences = deployment.load.sequences
    needed = deployment.weight_bytes(base) + deployment.cache_bytes_of(base, sequences)
    choice = _sizes(deployment, base, objective, sequences, needed - deployment.usable_bytes)
    return replace(base, sizes=choice.sizes), choice


def fine_grained_within(
    deployment: Deployment, base: Layout, objective: Objective, target: float
) -> tuple[Layout, Choice]:
    """A layout with the sizes that reach the highest throughput within a target of TPOT: those of
    the objective, or those that free most, where room for more sequences is worth their time.
    """
    sequences = deployment.most_within(base, target) or deployment.load.sequences
    tried: dict[Objective, Choice] = {
        name: _sizes(deployment, base, name, sequences) for name in (objective, "memory")
    }
    within = {
        name: deployment.most_within(replace(base, sizes=choice.sizes), target)
        for name, choice in tried.items()
    }
    best = max(tried, key=lambda name: within[name])  # the objective's, if both reach as much
    return replace(base, sizes=tried[best].sizes), tried[best]


def _sizes(
    deployment: Deployment, base: Layout, objective: Objective, sequences: int, needed: float = 0
) -> Choice:
    tokens = -(-sequences // base.data_parallel_size)
    cluster = deployment.cluster(base)
    return choose_sizes(deployment.shapes, cluster, tokens, objective, max(0.0, needed))


def smallest_replica(deployment: Deployment) -> Layout:
    """The fewest devices that hold one replica with the deployment's load: tensor parallelism
    within a node, and pipeline stages where that is not enough.
    """
    sizes = tensor_parallel_sizes(deployment, deployment.devices_per_node)
    found = [Layout(cut) for cut in sizes]
    found += [Layout(sizes[-1], 1, stages) for stages in range(2, deployment.summary.layers + 1)]
    fitting = (one for one in found if deployment.fits(one, deployment.load.sequences))
    return next(fitting, found[-1])


def _pipelines(deployment: Deployment, devices: int) -> list[Layout]:
    """The shallowest pipeline that fits, for the highest degree of tensor parallelism."""
    cut = tensor_parallel_sizes(deployment, devices)[-1]
    deep = [
        Layout(cut, devices // (cut * stages), stages)
        for stages in range(2, devices // cut + 1)
        if devices % (cut * stages) == 0 and stages <= deployment.summary.layers
    ]
    fitting = [one for one in deep if deployment.fits(one, deployment.load.sequences)]
    return (fitting or deep[-1:])[:1]


def _option(
    deployment: Deployment, layout: Layout, choice: Choice | None, target: float | None
) -> Option:
    load = deployment.load.sequences
    sequences = load if target is None else deployment.most_within(layout, target)
    meets = target is None or sequences > 0
    sequences = sequences or load
    most = deployment.max_sequences(layout)
    tpot = deployment.step(layout, sequences)
    return Option(
        layout=layout,
        fits=deployment.fits(layout, sequences),
        meets_target=meets and deployment.fits(layout, sequences),
        sequences=sequences,
        tpot=tpot,
        prefill=deployment.prefill_seconds(layout),
        throughput=sequences / tpot.mid / layout.devices,
        parts=deployment.parts(layout, sequences),
        weights=deployment.weight_parts(layout),
        cache_bytes=deployment.sequence_bytes(layout),
        most=most,
        throughput_at_most=deployment.throughput(layout, most),
        choice=choice,
    )


# in words -----------------------------------------------------------------------------------------


def _verdict(deployment: Deployment, options: list[Option], target: float | None) -> str:
    """Which layout wins, by how much and why, and whether that is sure."""
    best = options[0]
    if not best.fits:
        return _nothing_fits(deployment, options)
    lines = [_won(best, target)]
    if target is not None and not best.meets_target:
        lines = [f"No layout reaches {1e3 * target:.4g} ms per token; the nearest is {best.name}."]
    rivals = [one for one in options[1:] if one.fits]
    fine = next((one for one in rivals if one.layout.fine_grained), None)
    plain = next((one for one in rivals if not one.layout.fine_grained), None)
    other = fine if not best.layout.fine_grained else plain
    if other is not None:
        lines.append(_against(deployment, best, other))
    elif rivals:
        lines.append(_against(deployment, best, rivals[0]))
    elif len(options) > 1:
        lines.append("No other layout fits.")
    if best.layout.fine_grained:
        lines.append(_buys(deployment, best))
    else:
        lines.append("It needs no fine-grained sizes, so it does not need fgtp_pass.")
    return " ".join(line for line in lines if line)


def _won(best: Option, target: float | None) -> str:
    time = f"{_ms(best.tpot)} per token with {best.sequences:,} sequences in flight"
    rate = f"{best.throughput:,.0f} tokens/s per device"
    if target is None:
        return f"{best.name} wins: {time}, {rate}."
    return f"{best.name} wins: {rate} within {1e3 * target:.4g} ms, {time}."


def _ms(predicted: Predicted) -> str:
    low, mid, high = (1e3 * one for one in (predicted.low, predicted.mid, predicted.high))
    return f"{mid:.1f} ms ({low:.1f} to {high:.1f})"


def _against(deployment: Deployment, best: Option, other: Option) -> str:
    """How the best compares with another, and the part of a step that decides."""
    if best.sequences != other.sequences:
        times = best.throughput / other.throughput
        return (
            f"{other.name} reaches {other.throughput:,.0f} ({times:.2f} times less) with "
            f"{other.sequences:,} sequences."
        )
    more = predict(
        lambda scale: (
            sum(deployment.parts(other.layout, other.sequences, scale=scale).values())
            - sum(deployment.parts(best.layout, best.sequences, scale=scale).values())
        ),
        deployment.hardware.spreads,
    )
    part = max(best.parts, key=lambda name: other.parts[name] - best.parts[name])
    difference = other.parts[part] - best.parts[part]
    why = f"mostly {part} ({1e3 * difference:+.1f} ms)"
    if not more.certain:
        return (
            f"{other.name} is too close to call: {1e3 * more.mid:+.1f} ms "
            f"({1e3 * more.low:+.1f} to {1e3 * more.high:+.1f}), {why}."
        )
    return f"{other.name} takes {1e3 * other.tpot.mid:.1f} ms, {why}."


def _buys(deployment: Deployment, best: Option) -> str:
    """What the memory that sizes free is worth."""
    bought = freed(deployment, best)
    if bought is None:
        return ""
    more = bought["max_sequences"] - bought["max_sequences_without"]
    text = (
        f"Its sizes free {format_bytes(bought['bytes'])} on each device, room for {more:,} more "
        "sequences"
    )
    if not bought["max_sequences_without"]:
        return f"{text}; without them the weights alone do not fit."
    gain = bought["tokens_per_second_per_device"] / bought["tokens_per_second_per_device_without"]
    return f"{text}: {gain:.2f} times the tokens/s per device when all of it is used."


def freed(deployment: Deployment, option: Option) -> dict[str, Any] | None:
    """What the sizes of a layout free on a device and what that buys; None if it has none."""
    layout = option.layout
    if not layout.fine_grained:
        return None
    without = replace(layout, sizes={})
    most = deployment.max_sequences(without)
    return {
        "bytes": deployment.weight_bytes(without) - deployment.weight_bytes(layout),
        "max_sequences": option.most,
        "max_sequences_without": most,
        "tokens_per_second_per_device": option.throughput_at_most,
        "tokens_per_second_per_device_without": deployment.throughput(without, most),
    }


def _nothing_fits(deployment: Deployment, options: list[Option]) -> str:
    nearest = max(options, key=lambda one: one.most)
    if nearest.most:
        return (
            f"No layout has room for {deployment.load.sequences:,} sequences of "
            f"{deployment.load.context:,} tokens. {nearest.name} holds the most, {nearest.most:,}. "
            "Take more devices, fewer sequences, or a smaller dtype for the KV cache."
        )
    smallest = min(options, key=lambda one: sum(one.weights.values()))
    needed, usable = sum(smallest.weights.values()), deployment.usable_bytes
    return (
        f"The weights do not fit under any layout: {smallest.name} needs "
        f"{format_bytes(needed)} of {format_bytes(usable)} usable on each "
        "device. Take more devices, or weights of fewer bits."
    )

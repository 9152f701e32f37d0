"""What others measured and published, and what the cost model says of it.

`fitted` rows are what constants were fitted to; everything else is predicted blind. Run as a
program, it prints the table of docs/cost-model.md.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from statistics import median
from typing import Any

from sympy import Symbol

from fgtp_pass.algebra.placement import Collective
from fgtp_pass.cost import formulas, layout_formulas
from fgtp_pass.cost.estimate import estimate
from fgtp_pass.cost.hardware import load
from fgtp_pass.cost.layout import Deployment, Layout, Load
from fgtp_pass.cost.model_summary import ModelSummary
from fgtp_pass.cost.quantization import SCHEMES
from fgtp_pass.models.summarize import summarize

TOKENSPEED = "TokenSpeed PR 1610"
SHARED = "TokenSpeed PR 1652"
SGLANG = "SGLang PR 32313"
MEGATRON = "Megatron-LM PR 5596"
VLLM_ASCEND = "vLLM-Ascend docs"
LMSYS = "LMSYS, large-scale EP"
DEEPEP = "DeepEP, legacy.md"


@dataclass(frozen=True)
class Published:
    """One figure. predict: the same by the cost model. fitted: whether a constant rests on it."""

    source: str
    what: str
    value: float
    unit: str
    predict: Callable[[], float]
    fitted: bool = False

    @property
    def error(self) -> float:
        """|predicted - published| / |published|."""
        return abs(self.predict() - self.value) / abs(self.value)


@cache
def deepseek() -> ModelSummary:
    return summarize("deepseek-ai/DeepSeek-R1")


@cache
def llama() -> ModelSummary:
    return summarize("meta-llama/Llama-3.1-70B")


# matmuls and collectives ------------------------------------------------------------------------


def microseconds(
    expression: Any,
    hardware: str,
    tokens: float,
    group: int,
    elements: int = 0,
    widths: dict[Collective, float] | None = None,
    per_node: int = 8,
) -> float:
    """A component's formula for one 16-bit matmul and one collective of each given kind."""
    widths = widths or {}
    values: dict[Symbol, float] = {
        **load(hardware).values("bfloat16"),
        formulas.MATMULS: 1 if elements else 0,
        formulas.ELEMENTS: elements,
        formulas.ELEMENT_BYTES: 2,
        formulas.ROW_BYTES: 0,
        formulas.TOKENS: tokens,
        formulas.GROUP: group,
        formulas.RANKS_PER_NODE: per_node,
        **{formulas.COUNT[kind]: float(kind in widths) for kind in Collective},
        **{formulas.WIDTH[kind]: widths.get(kind, 0) for kind in Collective},
    }
    return 1e6 * formulas.evaluate(expression, values)


HIDDEN, HEADS = 7168, 12288  # Kimi-K3's o_proj, [7168, 12288] in bf16
O_PROJ = {Collective.ALL_TO_ALL: 2.0 * HEADS, Collective.REDUCE_SCATTER: 2.0 * HIDDEN}
# tokens per rank -> whole, over four ranks with NCCL; us
O_PROJ_TIMES = {
    128: (31.92, 94.62),
    256: (35.91, 120.12),
    512: (66.57, 175.28),
    1024: (102.09, 286.68),
    2048: (197.19, 516.92),
    4096: (406.56, 973.90),
    8192: (893.04, 1846.86),
}


def tokenspeed() -> Iterator[Published]:
    for tokens, (whole, sharded) in O_PROJ_TIMES.items():
        for size, time, fitted in ((1, whole, tokens == 128), (4, sharded, tokens in (128, 8192))):
            yield Published(
                TOKENSPEED,
                f"o_proj over {size}, {tokens} tokens per rank, GB300",
                time,
                "us",
                lambda tokens=tokens, size=size: microseconds(
                    formulas.SHARDED_SECONDS,
                    "gb300-nvl72",
                    tokens,
                    size,
                    HIDDEN * HEADS,
                    O_PROJ,
                    72,
                ),
                fitted,
            )
    # 92 layers with a shared expert of [4608, 7168] x 3 in bf16, 16.98 GiB; its collectives run
    # beside the routed experts, so only the matmuls are compared
    experts = 92 * 3 * 4608 * HIDDEN

    def change(tokens: float) -> float:
        whole, cut = (
            microseconds(formulas.COMPUTING_SECONDS, "gb300-nvl72", tokens, size, experts)
            for size in (1, 4)
        )
        return (cut - whole) / 1e3

    for name, time in (("cold", -2.04), ("incremental", -1.71)):
        what = f"shared experts over 4, 32 requests per rank, {name}, GB300"
        yield Published(SHARED, what, time, "ms", lambda: change(32))

    def crossover() -> float:
        """Tokens of a step, over the group, from which sharding gains nothing."""
        low, high = 1.0, 1e5
        while high - low > 1:
            middle = (low + high) / 2
            low, high = (middle, high) if change(middle / 4) < 0 else (low, middle)
        return high

    what = "shared experts over 4 gain below, tokens per step, GB300"
    yield Published("vLLM PR 50656", what, 1000, "tokens", crossover)


def logits() -> Iterator[Published]:
    vocabulary = 129280  # SGLang's megabytes are of elements: 31 Mi and 3.88 Mi of them
    yield Published(
        SGLANG,
        "lm_head whole, 36 tokens, B200",
        320,
        "us",
        lambda: microseconds(formulas.WHOLE_SECONDS, "b200", 36, 1, vocabulary * HIDDEN),
    )
    for kind, time, what in (
        (Collective.ALL_TO_ALL, 46, "all_to_all of logits, 36 tokens each, 8 B200"),
        (Collective.ALL_GATHER, 150, "all_gather of logits, 36 tokens each, 8 B200"),
    ):
        # an all_gather moves every rank's eighth of the vocabulary for all 288 tokens
        width = 2.0 * vocabulary
        yield Published(
            SGLANG,
            what,
            time,
            "us",
            lambda kind=kind, width=width: collective(kind, "b200", 8, 36, width),
        )
    gathered = "all_gather of logits"
    yield Published(
        "vLLM PR 55021",
        f"{gathered}, 40 KB of each of 8 B300",
        20.2,
        "us",
        lambda: collective(Collective.ALL_GATHER, "gb300-nvl72", 8, 1, 40e3),
        fitted=True,
    )
    yield Published(
        "reported, no source found",
        f"{gathered}, 256 x 152k, 8 B200",
        244,
        "us",
        lambda: collective(Collective.ALL_GATHER, "b200", 8, 256, 151936 / 8 * 2),
    )


def collective(kind: Collective, hardware: str, size: int, tokens: float, width: float) -> float:
    """Microseconds of one collective of `width` bytes for each of a rank's `tokens` tokens."""
    return microseconds(
        formulas.COLLECTIVES_SECONDS, hardware, tokens, size, widths={kind: width}, per_node=size
    )


def nccl() -> Iterator[Published]:
    """Device times without waiting for others, of the whole buffer, over 8 H100."""
    for kind, times in (
        (Collective.ALL_GATHER, {2: 20.2, 8: 43.4, 32: 118.9, 128: 385.3}),
        (Collective.REDUCE_SCATTER, {2: 18.6, 8: 47.0, 32: 112.6}),
    ):
        for mebibytes, time in times.items():
            each = mebibytes * 2**20 / 8
            yield Published(
                MEGATRON,
                f"{kind.value} of {mebibytes} MiB, 8 H100",
                time,
                "us",
                lambda kind=kind, each=each: collective(kind, "h100-sxm", 8, 1, each),
            )
    for mebibytes, time in {0.5: 13.0, 1: 16.0, 2: 21.0, 4: 31.0}.items():
        each = mebibytes * 2**20 / 6
        yield Published(
            "vLLM PR 24111",
            f"all_reduce of {mebibytes} MiB, 6 H100",
            time,
            "us",
            lambda each=each: collective(Collective.ALL_REDUCE, "h100-sxm", 6, 1, each),
            fitted=mebibytes in (0.5, 4),
        )


def deepep() -> Iterator[Published]:
    """Dispatch and combine together: 128 tokens, hidden 7168, top 8, out in fp8, back in bf16."""

    def both(ranks: int) -> float:
        values: dict[Symbol, float] = {
            **load("h800").values("float8"),
            layout_formulas.ACTIVE: 8,
            layout_formulas.EXPERT_LAYERS: 1,
            layout_formulas.DISPATCH_ROW: HIDDEN,
            layout_formulas.ROW: 2 * HIDDEN,
            layout_formulas.IMBALANCE: 1,
            layout_formulas.TENSOR_PARALLEL: 1,
            layout_formulas.DEVICES_PER_NODE: 8,
            layout_formulas.PREFILLS: 0,
            layout_formulas.EXPERT_DEVICES: ranks,
            formulas.TOKENS: 128,
        }
        return 1e6 * formulas.evaluate(layout_formulas.EXCHANGE_SECONDS, values)

    for ranks, time in {8: 191, 16: 313, 32: 428, 64: 487, 128: 561, 256: 554}.items():
        yield Published(
            DEEPEP,
            f"experts' all_to_all and back, {ranks} H800",
            time,
            "us",
            lambda ranks=ranks: both(ranks),
            fitted=ranks in (8, 16, 64),
        )


# whole steps ------------------------------------------------------------------------------------


def ascend() -> Iterator[Published]:
    def change(component: str) -> float:
        deployment = Deployment(
            deepseek(), load("ascend-910b-a2"), Load(32 * 24, 4096, scheme=SCHEMES["w8a8"]), 8
        )
        cluster = deployment.cluster(Layout(1, 32, expert_parallel=True))
        sizes = dict.fromkeys(deployment.shapes, 8)
        rows = estimate(deployment.shapes, cluster, sizes, 24)
        return next(row.tpot_change_ms for row in rows if row.component == component)

    for component, time in (("oproj", 1.5), ("lmhead", -1.2), ("mlp", -1.0), ("embedding", -1.0)):
        yield Published(
            VLLM_ASCEND,
            f"{component} over 8, DeepSeek-R1-W8A8 on 32 910B, 24 tokens per rank",
            time,
            "ms",
            lambda component=component: change(component),
            fitted=component == "oproj",
        )


def per_node(
    hardware: str, devices: int, each: int, context: tuple[int, int], halves: bool
) -> float:
    """Output tokens per second of a node of 8 that decodes DeepSeek-V3 with experts over all.

    halves: a batch in two halves, one of which computes while the other sends: a step takes twice
    the longer of the two.
    """
    deployment = Deployment(
        deepseek(), load(hardware), Load(each * devices, *context, deepseek().scheme), 8
    )
    layout = Layout(1, devices, expert_parallel=True)
    if not halves:
        return 8 * deployment.throughput(layout, each * devices)
    parts = deployment.parts(layout, each * devices // 2)
    sending = parts["experts' all_to_all"]
    return 8 * each / (2 * max(sending, sum(parts.values()) - sending))


def prefill_per_node(tokens: int) -> float:
    """Input tokens per second of a node of 32 H100 that take in 16k tokens each, in two halves."""
    deployment = Deployment(deepseek(), load("h100-sxm"), Load(1, tokens, 0, deepseek().scheme), 8)
    layout = Layout(1, 32, expert_parallel=True)
    prompts = 16384 // tokens
    parts = deployment.parts(layout, 32 * prompts // 2, prefill=True)
    sending = parts["experts' all_to_all"]
    return 8 * 16384 / (2 * max(sending, sum(parts.values()) - sending))


def throughput() -> Iterator[Published]:
    rate = "tokens/s per node"
    for what, value, predict, fitted in (
        (
            "decode on 72 H100, 256 each, 2,000 tokens, one batch",
            22282 / 1.255,
            lambda: per_node("h100-sxm", 72, 256, (2000, 100), False),
            True,
        ),
        (
            "decode on 72 H100, 256 each, 2,000 tokens, two halves",
            22282,
            lambda: per_node("h100-sxm", 72, 256, (2000, 100), True),
            False,
        ),
        (
            "decode on 128 H800, 128 each, 4,096 tokens: DeepSeek's profile",
            18598,
            lambda: per_node("h800", 128, 128, (4096, 0), True),
            False,
        ),
        (
            "decode on 144 H800, 128 each, 4,989 tokens: DeepSeek's day",
            14800,
            lambda: per_node("h800", 144, 128, (4989, 0), True),
            False,
        ),
    ):
        yield Published(LMSYS, what, value, rate, predict, fitted)
    for tokens, value in ((1024, 57674), (2048, 54543), (4096, 50302)):
        what = f"prefill on 32 H100, prompts of {tokens:,}, two halves"
        yield Published(LMSYS, what, value, rate, lambda tokens=tokens: prefill_per_node(tokens))
    yield Published(
        "vLLM PR 20759",
        "Llama-3.1-70B on 4 B200, one request per second: time per token",
        12.88,
        "ms",
        lambda: (
            1e3
            * Deployment(llama(), load("b200"), Load(2, 550, 150), 8).step_seconds(Layout(4, 1), 2)
        ),
        fitted=True,
    )


def rows() -> list[Published]:
    return [
        *tokenspeed(),
        *logits(),
        *nccl(),
        *deepep(),
        *ascend(),
        *throughput(),
    ]


def table() -> str:
    """The rows as Markdown."""
    lines = ["| source | what | published | predicted | error | |", "|---|---|---|---|---|---|"]
    for row in rows():
        digits = 0 if abs(row.value) >= 1000 else 1 if abs(row.value) >= 10 else 2
        value, predicted = (f"{x:,.{digits}f}" for x in (row.value, row.predict()))
        lines.append(
            f"| {row.source} | {row.what} | {value} {row.unit} | {predicted} | {row.error:.0%} | "
            f"{'fitted' if row.fitted else ''} |"
        )
    return "\n".join(lines)


def blind_error() -> float:
    """The median error of what was predicted blind."""
    return median(row.error for row in rows() if not row.fitted)


if __name__ == "__main__":
    print(table())
    print(
        f"\nmedian error of the {sum(not r.fitted for r in rows())} blind rows: {blind_error():.0%}"
    )

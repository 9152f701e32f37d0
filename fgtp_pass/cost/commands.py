"""Commands that serve a layout: vLLM's, vLLM-Ascend's, SGLang's and MindIE's, where they can."""

import json
import shlex
from dataclasses import dataclass, field
from pathlib import PurePath

from fgtp_pass.cost.layout import Deployment, Layout
from fgtp_pass.cost.spelling import vllm_config
from fgtp_pass.plan.sizes import COMPONENT_SIZES

# the components that vLLM-Ascend has sizes for
ASCEND = ("embedding", "lmhead", "oproj", "mlp")
_MINDIE = {"oproj": "o_proj_local_tp", "lmhead": "lm_head_local_tp"}
_MINDIE_MODELS = ("deepseek_v3",)  # R1, V3 and V3.1
_RPC_PORT = 13345


@dataclass(frozen=True)
class Command:
    """What to run. text: "" where a system cannot do it. notes: what it leaves out, or why."""

    system: str
    text: str
    notes: tuple[str, ...] = field(default=())


def serve_command(deployment: Deployment, layout: Layout, sequences: int) -> Command:
    """The command for the deployment's kind of device: vLLM's, or on Ascend vLLM-Ascend's.

    sequences: in flight on all devices together.
    """
    ascend = deployment.hardware.family == "ascend"
    serve = vllm_ascend if ascend else vllm
    return serve(deployment, layout, sequences)


def vllm(deployment: Deployment, layout: Layout, sequences: int) -> Command:
    """`vllm serve` with fgtp_pass where the layout has sizes; stock vLLM where it has none."""
    parts, notes = _vllm_serve(deployment, layout, sequences)
    config = vllm_config(layout.sizes, deployment.summary.keys)
    parts += _drafting(deployment)
    quantization, note = vllm_quantization(deployment)
    parts += quantization
    if config:
        parts += ["--compilation-config", json.dumps({"passes": ["fgtp"]})]
        parts += ["--additional-config", json.dumps({COMPONENT_SIZES: config})]
    if layout.sizes.get("qkv", 1) > 1 and deployment.summary.latent:
        notes.append(
            "qkv: vLLM's attention takes kv_b_proj apart, so it stays whole and frees less."
        )
    if layout.expert_parallel:
        notes.append(
            "The experts' all_to_all is priced as DeepEP's kernels, where they are installed: "
            "--all2all-backend deepep_low_latency."
        )
    return Command("vLLM", shlex.join(parts), tuple(notes + note))


def vllm_ascend(deployment: Deployment, layout: Layout, sequences: int) -> Command:
    """`vllm serve` for vLLM-Ascend, whose own fine-grained tensor parallelism reads the sizes."""
    parts, notes = _vllm_serve(deployment, layout, sequences)
    parts += _drafting(deployment)
    scheme = deployment.load.scheme
    if scheme is not None:
        parts += ["--quantization", "ascend"]
        notes.append(
            f"--quantization ascend needs a checkpoint that msmodelslim made ({scheme.name})."
        )
    known = [key for key in deployment.summary.keys if key.component in ASCEND]
    config = vllm_config(layout.sizes, known)
    beyond = [n for n, size in layout.sizes.items() if size > 1 and n not in ASCEND]
    if config and layout.tensor_parallel_size > 1:
        return Command(
            "vLLM-Ascend",
            "",
            ("vLLM-Ascend takes fine-grained sizes with --tensor-parallel-size 1 only.",),
        )
    if config:
        parts += ["--additional-config", json.dumps({COMPONENT_SIZES: config})]
        if "oproj" in layout.sizes and layout.sizes["oproj"] > 1:
            notes.append(
                "o_proj: in graph mode on the decode instances of a disaggregated deployment only, "
                "so add the --kv-transfer-config of yours."
            )
    if beyond:
        notes.append(f"vLLM-Ascend has no size for {' and '.join(beyond)}.")
    return Command("vLLM-Ascend", shlex.join(parts), tuple(notes))


def sglang(deployment: Deployment, layout: Layout, sequences: int) -> Command:
    """SGLang's launch command. Its groups are one rank or all of them, for models with experts."""
    summary, ranks, sizes = deployment.summary, layout.data_parallel_size, layout.sizes
    if summary.experts is None or layout.tensor_parallel_size > 1 or ranks == 1:
        return Command(
            "SGLang", "", ("SGLang has data-parallel attention for models with experts.",)
        )
    on = {name: size for name, size in sizes.items() if size > 1}
    if set(on) - {"mlp", "lmhead"} or set(on.values()) - {ranks}:
        reason = f"SGLang cuts the dense FFN and lm_head over all {ranks} ranks or not at all"
        return Command("SGLang", "", (f"{reason}, and nothing else.",))
    parts = ["python", "-m", "sglang.launch_server", "--model-path", _model_path(summary.name)]
    parts += ["--tp-size", str(ranks), "--dp-size", str(ranks), "--enable-dp-attention"]
    parts += ["--ep-size", str(ranks), "--moe-dense-tp-size", str(on.get("mlp", 1))]
    parts += [] if "lmhead" in on else ["--enable-dp-lm-head"]
    notes: tuple[str, ...] = ()
    nodes = -(-ranks // deployment.devices_per_node)
    if nodes > 1:
        parts += ["--nnodes", str(nodes), "--node-rank", "0", "--dist-init-addr", "NODE0:5000"]
        notes = (f"On every node with its own --node-rank, 0 to {nodes - 1}.",)
    parts += ["--context-length", str(deployment.load.context)]
    return Command("SGLang", shlex.join(parts), notes)


def mindie(deployment: Deployment, layout: Layout, sequences: int) -> Command:
    """The part of MindIE's config.json that says the sizes, for the models that have them there."""
    summary = deployment.summary
    if deployment.hardware.family != "ascend" or summary.model_type not in _MINDIE_MODELS:
        return Command("MindIE", "", ("MindIE splits these for DeepSeek-R1 and V3 on Atlas only.",))
    if layout.tensor_parallel_size > 1:
        return Command("MindIE", "", ("MindIE splits o_proj with tp 1 only.",))
    node = min(layout.data_parallel_size, deployment.devices_per_node)
    said = {
        key: size if 1 < (size := layout.sizes.get(name, 1)) <= node else -1
        for name, key in _MINDIE.items()
    }
    if set(said.values()) == {-1}:
        return Command("MindIE", "", ("MindIE splits o_proj and lm_head only.",))
    config = {
        "ModelConfig": [
            {
                "modelName": summary.name.rpartition("/")[2],
                "worldSize": layout.data_parallel_size,
                "tp": 1,
                "dp": layout.data_parallel_size,
                "models": {"deepseekv2": {"parallel_options": said}},
            }
        ]
    }
    note = "For distributed decode instances, as part of ModelDeployConfig in conf/config.json."
    return Command("MindIE", json.dumps(config), (note,))


def _vllm_serve(
    deployment: Deployment, layout: Layout, sequences: int
) -> tuple[list[str], list[str]]:
    """The words that vLLM and vLLM-Ascend share, and notes."""
    summary, load = deployment.summary, deployment.load
    ranks = layout.data_parallel_size
    parts = ["vllm", "serve", _model_path(summary.name)]
    # vLLM cuts experts over all data-parallel ranks, so replicas with experts are apart
    apart = summary.experts is not None and not layout.expert_parallel and ranks > 1
    for flag, size in (
        ("--tensor-parallel-size", layout.tensor_parallel_size),
        ("--pipeline-parallel-size", layout.pipeline_parallel_size),
        ("--data-parallel-size", 1 if apart else ranks),
    ):
        if size > 1:
            parts += [flag, str(size)]
    notes = [f"Run {ranks} of these, on devices of their own, behind a load balancer."]
    if not apart:
        notes = _over_nodes(deployment, layout, parts)
    if layout.expert_parallel:
        parts.append("--enable-expert-parallel")
    parts += ["--max-model-len", str(load.context)]
    parts += ["--max-num-seqs", str(-(-sequences // ranks))]
    if load.cache_dtype not in (None, "auto", summary.cache_dtype):
        parts += ["--kv-cache-dtype", str(load.cache_dtype)]
    return parts, notes


def _drafting(deployment: Deployment) -> list[str]:
    """The flag for the layers for multi-token prediction, where they are asked for."""
    draft = deployment.summary.draft
    if not deployment.load.draft or draft is None:
        return []
    drafts = {"method": "mtp", "num_speculative_tokens": draft.layers}
    return ["--speculative-config", json.dumps(drafts)]


def _over_nodes(deployment: Deployment, layout: Layout, parts: list[str]) -> list[str]:
    """Adds what several nodes need; says what the other nodes run."""
    one_rank = layout.tensor_parallel_size * layout.pipeline_parallel_size
    if layout.devices <= deployment.devices_per_node:
        return []
    local = deployment.devices_per_node // one_rank
    if not local:
        nodes = -(-layout.devices // deployment.devices_per_node)
        return [f"A replica lies over {nodes} nodes: add --nnodes, --node-rank and --master-addr."]
    parts += ["--data-parallel-size-local", str(local)]
    parts += ["--data-parallel-address", "NODE0", "--data-parallel-rpc-port", str(_RPC_PORT)]
    starts = range(local, layout.data_parallel_size, local)
    return [
        "NODE0 is the address of the first node. The other nodes run the same with --headless and "
        f"--data-parallel-start-rank {', '.join(map(str, starts))}."
    ]


def _model_path(name: str) -> str:
    """What an engine takes for the model: of a config.json, the folder that holds it."""
    path = PurePath(name)
    return str(path.parent) if path.suffix == ".json" else name


def vllm_quantization(deployment: Deployment) -> tuple[list[str], list[str]]:
    """The flag of a scheme that vLLM makes while it loads, or what checkpoint is needed."""
    scheme, declared = deployment.load.scheme, deployment.summary.scheme
    if scheme == declared:
        return [], []
    if scheme is not None and scheme.name == "fp8" and declared is None:
        return ["--quantization", "fp8"], []
    wanted = "is not quantised" if scheme is None else f"is quantised as {scheme.name}"
    return [], [f"Serve a checkpoint that {wanted}: these figures are for one."]

"""The adapter to vLLM: `compilation_config={"passes": ["fgtp"]}`. See docs/vllm.md.

    early         what vLLM loads while it is imported: `passes`, `LLM(data_parallel_size=)`
    plugin        what vLLM loads later: hooks, which act only when `passes` asks
    settings      what the user asked for, checked against the engine's configuration
    build_model   building the model: plan, agree with the other ranks, build
    meta_plan     which layers are sharded: the core's detection on a meta-device trace
    stages        pipeline stages: what of a plan is of one
    layer_limits  the core's patterns, within what vLLM's layers can be cut into
    kept_plan     the plan from disk, where the same configuration was planned before
    checkpoint_identity  what tells one checkpoint from another, before any of it is loaded
    born_sharded  layers that are born sharded, and emit marker ops
    projections   the same for what makes queries, keys and values
    marker_ops    the marker ops: whole shapes for the graph, collectives when run eagerly
    graph_pass    the pass: marker ops -> the core's rewrite -> sharded matmuls and collectives
    fused_norms   add and norm in one op, taken apart where sites share a stretch across it
    logits        lm_head, which vLLM runs outside the graph
    work          what each rank does outside the graph, told to the others in vLLM's own message
    taking_part   where idle ranks take part in it
    stretch       an FFN without a graph
    adapters      LoRA beside sharded layers
    experts       how planning sees experts; shared ones, within vLLM's op, are such an FFN
    worker        the worker process, in which they do
    failure       waits for other ranks: how long they are, and who is named when one fails
    lockstep      what keeps the data-parallel ranks in step
    offline       the client of `LLM(data_parallel_size=N)`, which feeds every rank
    host          every private name of vLLM that is used, checked when it is loaded
    check         `python -m fgtp_pass.vllm.check`: whether the pass works in this vLLM

Nothing else in fgtp_pass knows vLLM.

May import: algebra, graph, collectives, agreement, detect, patterns, plan, rewrite, options.
May be imported by: no other room.
"""

from typing import Any

PASS = "fgtp"  # in `CompilationConfig.passes`


def asks(compilation: Any) -> bool:
    """Whether a compilation config, an object or a dict, asks for the pass."""
    if isinstance(compilation, dict):
        passes = compilation.get("passes", ())
    else:
        passes = getattr(compilation, "passes", ())
    return PASS in ([passes] if isinstance(passes, str) else passes)

"""The adapter to vLLM: `compilation_config={"passes": ["fgtp"]}`. See docs/vllm.md.

    plugin     what vLLM loads: the `passes` field, and the hooks, which act only when it asks
    settings   what the user asked for, checked against the engine's configuration
    sites      which layers are sharded: the core's detection on a meta-device trace
    layers     layers that are born sharded, and emit marker ops
    ops        the marker ops: whole shapes for the graph, collectives when run eagerly
    graph      the pass: marker ops -> the core's rewrite -> sharded matmuls and collectives
    logits     lm_head, which vLLM runs outside the graph
    lockstep   what keeps the data-parallel ranks in step
    host       every private name of vLLM that is used, checked when it is loaded

Nothing else in fgtp_pass knows vLLM.
"""

"""The plan as data, the sizes that a user asks for, and the planner that makes one of the other.

`plan` and `sizes` import no torch: the command line reads them.

May import: algebra, graph, detect.
May be imported by: weights, rewrite, step, cost, calibration, options, backend, checkpoint,
    dry_run, models, page, cli, vllm.
"""

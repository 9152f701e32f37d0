"""How a graph is written anew along the paths of its plan.

May import: algebra, graph, collectives, detect, plan, weights.
May be imported by: step, backend, dry_run, vllm.
"""

"""Which parts of a graph are sites of components, and why every other parameter stays whole.

May import: algebra, graph.
May be imported by: patterns, plan, rewrite, options, backend, dry_run, vllm.
"""

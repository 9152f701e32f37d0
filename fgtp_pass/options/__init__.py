"""What a user may ask for, and the sizes that "auto" stands for.

May import: algebra, graph, collectives, agreement, detect, patterns, plan, cost, calibration.
May be imported by: backend, vllm.
"""

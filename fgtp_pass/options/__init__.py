"""What a user may ask for, and the sizes that "auto" stands for.

May import: graph, collectives, agreement, detect, patterns, plan, cost, calibration.
May be imported by: backend, vllm.
"""

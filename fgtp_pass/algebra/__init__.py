"""The placement algebra: every lowering of every component is one path through it.

A tensor on a group of k ranks has a placement, and fine-grained tensor parallelism is the choice
of placements. Moving between two placements is a collective on dim 0; applying a cut weight takes
one placement to another.

May import: no other room.
May be imported by: detect, patterns, plan, rewrite, cost, calibration, options, vllm.
"""

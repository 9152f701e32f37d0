"""A compiled graph at run time: agree with the group, hand in the shards, run; or idle.

May import: graph, collectives, agreement, plan, weights, rewrite.
May be imported by: backend.
"""

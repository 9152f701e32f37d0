"""The host torch.compile: the way of one graph from Dynamo to a compiled step.

May import: collectives, agreement, detect, plan, weights, rewrite, step, options.
May be imported by: checkpoint.
"""

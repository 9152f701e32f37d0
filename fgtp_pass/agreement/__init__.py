"""How ranks make sure that they do the same thing, before tensors move.

May import: collectives.
May be imported by: weights, step, options, backend, checkpoint, vllm.
"""

"""Groups of ranks, what they write for each other, and each collective on tensors, once.

May import: no other room.
May be imported by: agreement, weights, rewrite, step, calibration, options, backend, dry_run,
    checkpoint, vllm.
"""

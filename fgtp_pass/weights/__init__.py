"""Parameters to shards and back: cut, stored, read, put together again.

May import: collectives, agreement, plan.
May be imported by: rewrite, step, calibration, backend, checkpoint.
"""

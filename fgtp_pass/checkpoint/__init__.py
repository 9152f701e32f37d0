"""Models from and to disk in shards: read, saved, and given new weights; never whole on a rank.

May import: collectives, agreement, plan, weights, backend.
May be imported by: no other room.
"""

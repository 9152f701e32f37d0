"""The constants of the cost model, measured on this machine by real ranks.

May import: algebra, collectives, plan, weights, cost.
May be imported by: options, cli.
"""

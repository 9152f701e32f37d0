"""A plan to look at: one self-contained HTML page, and a static plot.

May import: plan, cost.
May be imported by: cli.
"""

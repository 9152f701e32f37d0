"""What the backend would do, without ranks and without weights: plans, graphs as text.

May import: graph, collectives, detect, patterns, plan, rewrite.
May be imported by: models.
"""

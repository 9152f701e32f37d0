"""A config.json to the plan of all layers of its model.

May import: patterns, plan, cost, dry_run.
May be imported by: cli.
"""

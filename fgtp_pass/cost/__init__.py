"""What fine-grained TP saves and costs, in bytes and seconds. See docs/cost-model.md.

Imports no torch.

May import: algebra, plan.
May be imported by: calibration, options, models, page, cli.
"""

"""What fine-grained TP saves and costs, in bytes and seconds. See docs/cost-model.md.

Nothing here imports torch, except for calibration.
"""

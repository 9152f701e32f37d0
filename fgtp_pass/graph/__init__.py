"""How a Dynamo graph is read: what each op does, a normal form, where values come from and go to.

May import: no other room.
May be imported by: detect, patterns, plan, rewrite, step, options, dry_run, vllm.
"""

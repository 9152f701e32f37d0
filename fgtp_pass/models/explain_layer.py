"""What the pass does to one decoder layer: its sites, and its graph before and after."""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fgtp_pass.dry_run.snapshot import snapshot_graphs
from fgtp_pass.errors import ConfigError
from fgtp_pass.models.layer_stack import LayerStack, find_layers, only_layer
from fgtp_pass.models.meta_model import build
from fgtp_pass.models.trace_layers import Progress, as_config_errors, decode_call, traced_plan
from fgtp_pass.patterns import BUILTIN
from fgtp_pass.plan.plan import Plan


@dataclass(frozen=True)
class ExplainedLayer:
    """One decoder layer: the plan of its parameters, and its graph before and after as text.

    The graphs also hold what stands around a model's layers, since that is how Dynamo sees it;
    only this layer's components are rewritten.
    """

    name: str
    plan: Plan
    before: str
    after: str

    @property
    def difference(self) -> list[str]:
        """The lines that change, each with the one before and after it.

        A line whose values only have other numbers is the same.
        """
        before, after = self.before.splitlines(), self.after.splitlines()
        old, new = ([re.sub(r"%\d+", "%", line) for line in text] for text in (before, after))
        lines: list[str] = []
        matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
        for group in matcher.get_grouped_opcodes(1):
            lines.append("@@")
            for tag, a, b, c, d in group:
                if tag == "equal":
                    lines += [f" {line}" for line in after[c:d]]
                else:
                    lines += [f"-{line}" for line in before[a:b]]
                    lines += [f"+{line}" for line in after[c:d]]
        return lines


def explain_layer(
    config: Mapping[str, Any], layer: int, size: int, progress: Progress
) -> ExplainedLayer:
    """What the pass does to decoder layer number `layer`, with all components over `size` ranks.

    Raises ConfigError as `trace_summary` does, and for a layer that the model does not have.
    """
    progress("building the model without weights")
    model = build(config)
    stack: LayerStack | None = find_layers(model)
    if stack is None or layer >= len(stack.layers):
        count = len(stack.layers) if stack else 0
        raise ConfigError(f"there is no layer {layer}: the model has {count}, from 0 on")
    progress(f"tracing layer {layer}")
    with stack.only([layer]), as_config_errors():
        plan = traced_plan(model, size)
        inside = {
            site.component for site in plan.sites if stack.number(site.weights[0].fqn) is not None
        }
        sizes = {known.config_key: size for known in BUILTIN if known.component in inside}
        (graph, *_) = snapshot_graphs(
            model,
            kwargs=decode_call(),
            data_parallel_size=size,
            finegrained_tp_config=sizes,
        )
    first, name = f"{stack.prefix}0.", f"{stack.prefix}{layer}"
    before, after = (text.replace(first, f"{name}.") for text in (graph.before, graph.after))
    return ExplainedLayer(name, only_layer(plan, stack, layer), before, after)

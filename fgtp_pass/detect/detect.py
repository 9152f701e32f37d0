"""detect: run the patterns over a graph; give each parameter a site or a reason to stay whole."""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import fx
from torch.amp.autocast_mode import _enter_autocast

from fgtp_pass.detect.match import Findings, Match, Pattern, Refusal
from fgtp_pass.detect.moved import reads_what_changes
from fgtp_pass.detect.reasons import general_reason
from fgtp_pass.detect.touching import Links, find_links
from fgtp_pass.dynamo import paused_garbage_collection
from fgtp_pass.graph.dataflow import GraphView
from fgtp_pass.graph.inputs import (
    aliased_inputs,
    numbers_of_the_model,
    special_parameters,
    split_inputs,
)


@dataclass(frozen=True)
class Detection:
    """The sites of a graph in graph order, which of them touch, and the reason for every parameter
    in none of them.

    opt_in: the components that are off unless they are asked for.
    """

    view: GraphView
    matches: tuple[Match, ...]
    left_alone: dict[str, str]
    links: Links = field(default_factory=Links)
    opt_in: frozenset[str] = frozenset()

    def only(self, weights: Container[fx.Node]) -> "Detection":
        """Without the sites of which a weight is not among these."""
        kept = {match for match in self.matches if all(w in weights for w in match.weights)}
        return replace(
            self,
            matches=tuple(match for match in self.matches if match in kept),
            links=self.links.between(kept),
        )


@paused_garbage_collection()
def detect(
    graph: fx.Graph,
    example_inputs: Sequence[object],
    patterns: Sequence[Pattern],
    names: Mapping[int, str] | None = None,
) -> Detection:
    """Find the sites of all patterns. Reads the graph, changes nothing.

    example_inputs: the values that Dynamo hands to a backend, one per placeholder; they tell
    parameters from other inputs. names: the parameters' names by id, where they are known; else
    they are Dynamo's, relative to the module whose code it compiles.
    """
    parameters, buffers = split_inputs(graph, example_inputs, names or {})
    aliases = aliased_inputs(graph, example_inputs)
    numbers = numbers_of_the_model(graph, example_inputs)
    view = GraphView(graph, parameters, buffers, aliases, numbers)
    found, refused = Findings(), dict[fx.Node, str]()
    autocast = any(node.target is _enter_autocast for node in graph.nodes)
    special = special_parameters(graph, example_inputs)
    for changed in view.may_be_written(parameters):
        special[changed] = "the graph changes it in place, or an op that is not known may"
    for pattern in patterns:
        for result in pattern.find(view, found):
            if isinstance(result, Refusal):
                refused.setdefault(result.placeholder, result.reason)
                continue
            reason = next((special[w] for w in result.parameters if w in special), "")
            reason = reason or reads_what_changes(view, result)
            if autocast:
                reason = "the graph switches autocast, so its dtypes are not known"
            if reason:
                refused.update((w, reason) for w in result.parameters)
            else:
                found.add(result)
    matches = sorted(found.matches, key=lambda match: view.order[match.place])
    used = {placeholder for match in matches for placeholder in match.parameters}
    left_alone = {
        fqn: refused.get(placeholder) or general_reason(view, placeholder)
        for placeholder, fqn in view.parameters.items()
        if placeholder not in used
    }
    opt_in = frozenset(pattern.component for pattern in patterns if pattern.opt_in)
    return Detection(view, tuple(matches), left_alone, find_links(view, matches), opt_in)

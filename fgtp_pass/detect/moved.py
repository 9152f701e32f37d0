"""Whether a site may be computed at one place, though its ops stood at several."""

from fgtp_pass.detect.match import LookupStage, Match
from fgtp_pass.graph.dataflow import GraphView
from fgtp_pass.graph.op_kinds import tensor_inputs


def reads_what_changes(view: GraphView, match: Match) -> str:
    """A reason if some op of the site would read other values at the place of its first output.

    Ops that stood before that place are computed later than they were, matmuls side by side that
    stood behind it earlier.
    """
    own = match.nodes
    for node in own:
        first, last = sorted((node, match.place), key=view.order.__getitem__)
        for read in tensor_inputs(node):
            if read not in own and view.may_change(read, after=first, before=last):
                return "what it reads is changed in place between its first op and its last"
    stage = match.stages[0]
    if isinstance(stage, LookupStage) or all(m.input is match.source for m in stage.matmuls):
        return ""
    root = view.exact_root(match.source)  # the others read another copy of it, made somewhere
    if view.may_change(root, after=root, before=max(own, key=view.order.__getitem__)):
        return "what its projections read is changed in place between them"
    return ""

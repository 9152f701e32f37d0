"""Where values come from and where they go: two linear passes over a Dynamo-level graph.

The facts are what patterns are defined by ("this matmul reads an attention core"). Names of
modules and parameters are never looked at.
"""

from collections.abc import Collection, Iterable, Mapping, Set
from dataclasses import replace
from functools import cached_property

import torch
from torch import fx

from fgtp_pass.graph.aliasing import shares_memory_with, written_nodes
from fgtp_pass.graph.facts import STATIC, Facts, Reach
from fgtp_pass.graph.normal_form import Lookup, NormalForm, ParamMatmul, read_lookup, read_matmul
from fgtp_pass.graph.op_kinds import (
    CASTS,
    SOFTMAX,
    OpKind,
    is_value,
    keeps_token_order,
    keeps_values,
    merges,
    op_kind,
    op_name,
    picks_from,
    tensor_inputs,
    value_of,
)
from fgtp_pass.graph.size_expression import size_inputs

_ELEMENTWISE = (OpKind.POINTWISE, OpKind.LAYOUT)
_PICKS = (OpKind.POINTWISE, OpKind.MATMUL, OpKind.SELECT)
# ops on integers through which token ids stay token ids
_ID_OPS = CASTS | {"clamp", "clip", "where", "masked_fill"}


class GraphView:
    """A Dynamo-level graph as the patterns read it; it changes nothing.

    `parameters` maps the placeholders of parameters to their fully qualified names, `buffers` are
    the placeholders of buffers. `aliases` are inputs that share memory with an earlier one.
    `numbers` are inputs that are numbers of the model, with their values as text.
    """

    def __init__(
        self,
        graph: fx.Graph,
        parameters: dict[fx.Node, str],
        buffers: set[fx.Node],
        aliases: Mapping[fx.Node, fx.Node],
        numbers: Mapping[fx.Node, str],
    ):
        self.graph = graph
        self.numbers = numbers
        self.parameters = parameters
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        self.normal_form = NormalForm()
        self.cores: list[fx.Node] = []
        self._begins: dict[fx.Node, int] = {}  # by core: where its first projection stands
        self.facts: dict[fx.Node, Facts] = {}
        self.writes: dict[fx.Node, frozenset[fx.Node]] = {}  # by op: whose memory it may change
        self._static: set[fx.Node] = set()
        self._memory: dict[fx.Node, frozenset[fx.Node]] = {}
        for node in graph.nodes:
            self._set(node, self._forward(node, buffers | numbers.keys()))
            shared = [aliases[node]] if node in aliases else shares_memory_with(node)
            self._memory[node] = frozenset({node}).union(*(self._memory[n] for n in shared))
            self._apply_writes(node)
        self.reach = self._backward()

    @property
    def matmuls(self) -> Iterable[ParamMatmul]:
        return self.normal_form.matmuls.values()

    @property
    def lookups(self) -> Iterable[Lookup]:
        return self.normal_form.lookups.values()

    def matmul_at(self, node: fx.Node) -> ParamMatmul | None:
        return self.normal_form.matmuls.get(node)

    @cached_property
    def token_tables(self) -> list[Lookup]:
        """The lookups by token ids."""
        return [lookup for lookup in self.lookups if self.facts[lookup.ids].token_ids]

    @cached_property
    def routers(self) -> frozenset[fx.Node]:
        """The matmuls from whose results experts are chosen, with those in front of them."""
        found: set[fx.Node] = set()
        heights = {lookup.weight.in_features for lookup in self.token_tables}
        for matmul in self.matmuls:
            vocabulary = matmul.out_features in heights or matmul.out_features > matmul.in_features
            if Reach.CHOICE not in self.reach[matmul.node] or vocabulary:
                continue
            part: ParamMatmul | None = matmul
            while part is not None and part.node not in found:  # a router may be an MLP
                found.add(part.node)
                before = self.facts[part.input].origin
                part = self.matmul_at(before) if before is not None else None
        return frozenset(found)

    @cached_property
    def router_sources(self) -> frozenset[fx.Node]:
        """The roots of the activations that routers read."""
        return frozenset(
            self.root(matmul.input) for matmul in self.matmuls if matmul.node in self.routers
        )

    @cached_property
    def adapters(self) -> Mapping[fx.Node, fx.Node]:
        """The matmuls of low-rank adapters, `base(x) + s * B(A(x))`: of A and of B, to base."""
        found: dict[fx.Node, fx.Node] = {}
        adapted: dict[fx.Node, ParamMatmul] = {}  # by sum: what is adapted, maybe once more
        for up in self.matmuls:
            origin = self.facts[up.input].origin
            down = self.matmul_at(origin) if origin is not None else None
            added = self.added(up.node)
            if not (down and added) or down.out_features >= min(down.in_features, up.out_features):
                continue
            total, other = added
            base = adapted.get(other) or self.matmul_at(self.root(other))
            if base is not None and self.root(base.input) is self.root(down.input):
                found |= {down.node: base.node, up.node: base.node}
                adapted[total] = base
        return found

    def added(self, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
        """The sum with another activation that alone reads the value, scaled; and that one."""
        while len(node.users) == 1:
            (user,) = node.users
            others = [n for n in tensor_inputs(user) if n is not node and not self.facts[n].static]
            if len(others) == 1 and op_name(user) == "add":
                return user, others[0]
            gated = not others or not merges(user)
            if not gated or op_kind(user) not in _ELEMENTWISE:
                return None
            node = user
        return None

    def weighted_by_choice(self, node: fx.Node) -> bool:
        """Whether what a topk or argmax chose scales or picks the value, as an expert's result."""
        for user in node.users:
            others = [n for n in tensor_inputs(user) if n is not node and not self.facts[n].static]
            beside = op_name(user) in ("stack", "cat", "concat")
            if others and not beside:
                picks = op_kind(user) in _PICKS and op_name(user) not in ("add", "sub")
                if picks and any(self.facts[n].chosen for n in others):
                    return True
            elif op_kind(user) in _ELEMENTWISE and self.weighted_by_choice(user):
                return True
        return False

    @cached_property
    def outputs(self) -> list[fx.Node]:
        return list(self.graph.output_node().all_input_nodes)

    def made_of(self, node: fx.Node, stop: Collection[fx.Node] = ()) -> set[fx.Node]:
        """The matmuls that the value is computed of, and nodes of `stop`, with none in between."""
        found, seen, stack = set[fx.Node](), {node}, [node]
        while stack:
            here = stack.pop()
            if here in self.normal_form.matmuls or (here in stop and here is not node):
                found.add(here)
                continue
            new = [n for n in here.all_input_nodes if n not in seen]
            seen.update(new)
            stack += new
        return found

    def returned_matmul(self, node: fx.Node) -> ParamMatmul | None:
        """The matmul at `node` if the graph returns a function of it and of nothing else."""
        if any(self.facts[out].origin is node for out in self.outputs):
            return self.matmul_at(node)
        return None

    def root(self, node: fx.Node) -> fx.Node:
        """The node behind views and casts: equal roots are the same activation, up to rounding."""
        while (name := op_name(node)) in CASTS or (name and keeps_token_order(node)):
            node = node.all_input_nodes[0]
        return node

    def exact_root(self, node: fx.Node) -> fx.Node:
        """The node behind views and casts that lose no value: equal roots, equal values.

        If the root's memory has not changed between.
        """
        root, dtypes = node, {value_of(node).dtype}
        while (name := op_name(node)) in CASTS or (name and keeps_token_order(node)):
            node = node.all_input_nodes[0]
            if all(keeps_values(value_of(node).dtype, dtype) for dtype in dtypes):
                root = node
            dtypes.add(value_of(node).dtype)
        return root

    def varies_by_rank(self, node: fx.Node) -> bool:
        """Whether it may be another on each rank, beside activations.

        A number of sizes or a caller's; or what follows from a buffer that the graph changes, which
        a rank that idles does not do.
        """
        return self._is_own_number(node) or node in self._changing

    def _is_own_number(self, node: fx.Node) -> bool:
        if is_value(node):
            return False
        return isinstance(value_of(node), torch.SymInt) or not self.facts[node].static

    @cached_property
    def _changing(self) -> Set[fx.Node]:
        """What follows, without any activation, from memory that some op may change."""
        written = frozenset[fx.Node]().union(*self.writes.values())
        found: set[fx.Node] = set()
        for node in self.graph.nodes:
            follows = self._memory[node] & written or not found.isdisjoint(node.all_input_nodes)
            if follows and node in self._static:
                found.add(node)
        return found

    @cached_property
    def _input_symbols(self) -> Set[object]:
        return size_inputs(self.graph).keys()

    def follows_from_inputs(self, sizes: Iterable[int | torch.SymInt]) -> bool:
        """Whether sizes can be computed from those of the graph's inputs, without any data."""
        symbols = (s.node.expr.free_symbols for s in sizes if isinstance(s, torch.SymInt))
        return all(some <= self._input_symbols for some in symbols)

    def memory_of(self, nodes: Iterable[fx.Node]) -> frozenset[fx.Node]:
        """The nodes whose memory the values of `nodes` may share."""
        return frozenset[fx.Node]().union(*(self._memory[node] for node in nodes))

    def may_be_written(self, nodes: Iterable[fx.Node]) -> list[fx.Node]:
        """Those of the nodes that some op may change in place."""
        written = frozenset[fx.Node]().union(*self.writes.values())
        return [node for node in nodes if self._memory[node] & written]

    def may_change(self, read: fx.Node, after: fx.Node, before: fx.Node) -> bool:
        """Whether some op between two others may change in place what `read` holds."""
        memory = self._memory[read]
        return any(
            self.order[after] < self.order[op] < self.order[before] and memory & written
            for op, written in self.writes.items()
        )

    # forward ----------------------------------------------------------------------------------

    def _set(self, node: fx.Node, facts: Facts) -> None:
        self.facts[node] = facts
        if facts.static:
            self._static.add(node)
        else:
            self._static.discard(node)

    def _forward(self, node: fx.Node, buffers: set[fx.Node]) -> Facts:
        if node.op == "placeholder":
            return self._input_facts(node, buffers)
        if node.op not in ("call_function", "call_method"):
            return STATIC
        matmul = read_matmul(node, self.parameters.keys(), self._static)  # type: ignore[arg-type]
        if matmul is not None:
            self.normal_form.matmuls[node] = matmul
            return Facts(origin=node)
        inputs = tensor_inputs(node)
        active = [self.facts[n] for n in inputs if not self.facts[n].static]
        lookup = read_lookup(node, set(self.parameters))
        if lookup is not None:
            self.normal_form.lookups[node] = lookup
            return Facts(origin=node) if active else STATIC
        if not active:
            varies = not is_value(node) and any(map(self._is_own_number, node.all_input_nodes))
            return Facts() if varies else STATIC
        return self._op_facts(node, inputs, active)

    def _input_facts(self, node: fx.Node, buffers: set[fx.Node]) -> Facts:
        value = value_of(node)
        if node in self.parameters or node in buffers or not isinstance(value, torch.Tensor):
            return STATIC
        integers = not value.dtype.is_floating_point and value.dtype is not torch.bool
        return Facts(origin=node, token_ids=integers)

    def _op_facts(self, node: fx.Node, inputs: list[fx.Node], active: list[Facts]) -> Facts:
        kind = op_kind(node)
        origins = {facts.origin for facts in active}
        origin = origins.pop() if len(origins) == 1 else None
        if kind is OpKind.ATTENTION:
            return self._core(node)
        chosen = kind is OpKind.CHOICE or any(facts.chosen for facts in active)
        cores = self._carried_cores(node, inputs, active)
        if kind is OpKind.MATMUL:
            linear = len(active) > 1 and any(facts.scores for facts in active) and not chosen
            if linear or any(facts.probs for facts in active):
                return self._core(node)
            return Facts(scores=len(active) > 1, cores=cores)
        if kind in (OpKind.CHOICE, OpKind.OTHER):
            return Facts(origin=origin, chosen=chosen, cores=cores)
        if kind is OpKind.SELECT:
            return Facts(origin=origin, selected=True, chosen=chosen)
        local = Facts(
            origin=origin,
            cores=cores,
            selected=all(facts.selected for facts in active) or active[0].selected,
            chosen=chosen,
        )
        if kind is OpKind.FEATURES:
            return replace(local, probs=op_name(node) == SOFTMAX and active[0].scores)
        return replace(
            local,
            scores=any(facts.scores for facts in active),
            probs=any(facts.probs for facts in active),
            token_ids=active[0].token_ids and (kind is OpKind.LAYOUT or op_name(node) in _ID_OPS),
        )

    def _carried_cores(
        self, node: fx.Node, inputs: list[fx.Node], active: list[Facts]
    ) -> frozenset[fx.Node]:
        carried = frozenset[fx.Node]().union(*(facts.cores for facts in active))
        if carried and len(inputs) > 1 and merges(node):
            for n in inputs:
                value = value_of(n)
                masks = isinstance(value, torch.Tensor) and value.dtype is torch.bool
                if self.facts[n].static or self.facts[n].cores or masks:
                    continue
                # a residual stream, older than the core's projections: past the component
                older = self.order[self.root(n)]
                carried = frozenset(core for core in carried if self._begins[core] < older)
        return carried

    def _core(self, node: fx.Node) -> Facts:
        self.cores.append(node)
        made_of = self.made_of(node, stop=self._begins.keys())
        begins = [self._begins.get(n, self.order[n]) for n in made_of]
        self._begins[node] = min(begins, default=self.order[node])
        return Facts(cores=frozenset({node}), origin=node)

    def _apply_writes(self, node: fx.Node) -> None:
        """An op that writes into its argument changes what later reads of that argument see."""
        written = frozenset[fx.Node]().union(*(self._memory[n] for n in written_nodes(node)))
        if not written:
            return
        self.writes[node] = written
        facts = self.facts[node]
        if not is_value(node) or node in self.cores:
            facts = Facts(cores=facts.cores)
        for changed in written - {node}:
            self._set(changed, facts)

    def _only_returned(self, node: fx.Node) -> bool:
        """Whether nothing but the caller makes use of what was chosen."""
        return all(
            user.op == "output" or (tensor_inputs(user) == [node] and self._only_returned(user))
            for user in node.users
        )

    # backward ---------------------------------------------------------------------------------

    def _backward(self) -> dict[fx.Node, Reach]:
        reach: dict[fx.Node, Reach] = {}
        cores = set(self.cores)
        for node in reversed(list(self.graph.nodes)):
            found = Reach.NOTHING
            for user in node.users:
                if user.op == "output":
                    found |= Reach.OUTPUT
                elif user in cores:
                    found |= Reach.ATTENTION
                elif user in self.normal_form.matmuls or user in self.normal_form.lookups:
                    found |= Reach.MATMUL
                else:
                    scores = self.facts[user].scores and op_kind(user) is OpKind.MATMUL
                    # the best of scores of two activations are positions, no experts
                    found |= reach[user] & ~Reach.CHOICE if scores else reach[user]
                    chooses = op_kind(user) is OpKind.CHOICE or picks_from(user, node)
                    if chooses and not self._only_returned(user):
                        found |= Reach.CHOICE
            for changed in self.writes.get(node, ()):
                for user in changed.users:  # what later reads of it flow into
                    if self.order[user] > self.order[node]:
                        found |= Reach.ATTENTION if user in cores else reach[user]
            reach[node] = found
        return reach

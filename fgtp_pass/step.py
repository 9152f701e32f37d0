"""One compiled graph at run time: hand it the shards, and meet the group before it runs."""

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx, nn
from torch.utils.weak import WeakIdKeyDictionary

from fgtp_pass.agreement import Act, Card, Council
from fgtp_pass.dynamo import SizeGuard
from fgtp_pass.errors import AgreementError, FgtpError, TokenCountError
from fgtp_pass.ops import value_of
from fgtp_pass.planner import PlannedSite, tokens_of
from fgtp_pass.rewrite import MINIMUM_ROWS, TokenClass
from fgtp_pass.weights import record_of, sharded_parameters


def sites_number(sites: Sequence[PlannedSite]) -> int:
    """A number that is equal on two ranks when they run the same sites in the same order."""
    text = "\n".join(site.site.model_dump_json() for site in sites)
    return zlib.crc32(text.encode())


class TokenCounter:
    """Computes a graph's token counts, one per token class, from its inputs.

    guards: what the compiled graph takes for granted about the rows it runs at (ragged).
    """

    def __init__(
        self, graph: fx.Graph, sites: Sequence[PlannedSite], guards: Sequence[SizeGuard] = ()
    ):
        counts: dict[TokenClass, Any] = {}
        for site in sites:
            counts[site.site.component, site.site.tokens] = tokens_of(site.match)
        self.classes = tuple(counts)
        where = _symbol_inputs(graph)
        self._count = _Evaluator([sympy.sympify(count) for count in counts.values()], where)
        self.guards = tuple(guard.condition for guard in guards)
        row_symbols = {symbol: n for guard in guards for symbol, n in guard.numbers.items()}
        behind = len(graph.find_nodes(op="placeholder"))
        where |= {symbol: (behind + n, 0) for symbol, n in row_symbols.items()}
        self._hold = _Evaluator(self.guards, where)

    def __call__(self, inputs: Sequence[Any]) -> list[int]:
        return [int(count) for count in self._count(inputs)]

    def broken_guard(self, inputs: Sequence[Any]) -> sympy.Basic | None:
        """A guard that does not hold for the inputs of the rewritten graph, or None."""
        held = zip(self.guards, self._hold(inputs), strict=True)
        return next((guard for guard, holds in held if not holds), None)


class _Evaluator:
    """Evaluates expressions in input sizes. `where`: (input, dim), or (input, None) for an int."""

    def __init__(
        self,
        expressions: Sequence[sympy.Basic],
        where: Mapping[sympy.Symbol, tuple[int, int | None]],
    ):
        symbols = sorted(set().union(*(e.free_symbols for e in expressions)), key=str)
        self._reads = [where[symbol] for symbol in symbols]
        self._function = sympy.lambdify(symbols, list(expressions), modules="math")

    def __call__(self, inputs: Sequence[Any]) -> list[Any]:
        values = [
            int(inputs[position] if dim is None else inputs[position].shape[dim])
            for position, dim in self._reads
        ]
        return list(self._function(*values))


def _symbol_inputs(graph: fx.Graph) -> dict[sympy.Symbol, tuple[int, int | None]]:
    """Where each size symbol can be read: (input, dim), or (input, None) for an int input."""
    where: dict[sympy.Symbol, tuple[int, int | None]] = {}
    for position, node in enumerate(graph.find_nodes(op="placeholder")):
        value = value_of(node)
        if isinstance(value, torch.SymInt):
            where.setdefault(value.node.expr, (position, None))
        elif isinstance(value, torch.Tensor):
            for dim, size in enumerate(value.shape):
                if isinstance(size, torch.SymInt):
                    where.setdefault(size.node.expr, (position, dim))
    return where


@dataclass(eq=False)
class Step:
    """What Dynamo calls in place of the graph.

    shards: the positions of sharded parameters among the inputs. packed: those of them that the
    graph takes packed.
    council: the ranks to meet before each run; None if token counts are not checked.
    idle: runs this graph's collectives for a rank without tokens.
    """

    compiled: Callable[..., Any]
    shards: tuple[int, ...]
    packed: frozenset[int]
    counter: TokenCounter
    sites: int
    council: Council | None
    ragged: bool
    idle: "IdleProgram"

    def __call__(self, *args: Any) -> Any:
        inputs = list(args)
        for position in self.shards:
            # The graph may be called with another layer's parameters (Dynamo shares code), so the
            # shard is the argument's own, not the one that was compiled with.
            record = record_of(inputs[position])
            assert record is not None, "Dynamo guards on the class of its inputs"
            inputs[position] = record.for_graph(position in self.packed)
        self.idle.remember(inputs)
        if self.council is not None:
            inputs += self._meet(self.council, self.counter(args))
            broken = self.counter.broken_guard(inputs) if self.ragged else None
            if broken is not None:
                raise FgtpError(
                    f"the compiled graph cannot run at these token counts: it needs {broken}. "
                    "Run torch.compiler.reset() on every rank, so that it is compiled again."
                )
        return self.compiled(*inputs)

    def _meet(self, council: Council, counts: list[int]) -> list[torch.Tensor]:
        """Agree on the token counts of this run; the row counts to append to the inputs."""
        cards = council.meet(Act.STEP, self.sites, counts)
        busy = [card for card in cards if card.act is Act.STEP]
        _check_same_sites(busy)
        _check_idle(cards)
        if not self.ragged:
            if any(list(card.tokens) != counts for card in busy):
                raise TokenCountError(_counts_differ(self.counter.classes, busy))
            return []
        largest = [max(column) for column in zip(*(card.tokens for card in busy), strict=True)]
        return [torch.empty(max(most, MINIMUM_ROWS), 0) for most in largest]


# by sharded parameter: the latest compiled graph that reads it
_latest_step = WeakIdKeyDictionary()


def note_step(step: Step, parameters: Iterable[nn.Parameter]) -> None:
    """Remember the step for `idle_step` as the latest one that reads these parameters."""
    for parameter in parameters:
        _latest_step[parameter] = step


def _check_same_sites(cards: Sequence[Card]) -> None:
    if len({card.sites for card in cards}) > 1:
        raise AgreementError(
            "the ranks of a group run graphs with different sites: "
            + ", ".join(f"rank {card.rank} graph {card.sites:08x}" for card in cards)
            + ". They must run the same model with the same features (cache, logits_to_keep)."
        )


def _check_idle(cards: Sequence[Card]) -> None:
    problems = [f"rank {c.rank}: {c.words}" for c in cards if c.act is Act.IDLE and c.words]
    if problems:
        raise AgreementError("a rank cannot idle in this step: " + "; ".join(problems))


def _counts_differ(classes: Sequence[TokenClass], cards: Sequence[Card]) -> str:
    listed = []
    for card in cards:
        counts = ", ".join(
            f"{component} {count}"
            for (component, _), count in zip(classes, card.tokens, strict=False)
        )
        listed.append(f"rank {card.rank}: {counts}")
    return (
        'tokens="equal" promises that all ranks of a group call with the same number of tokens, '
        f"but they came with ({'; '.join(listed)}). Pad the batches to one size, or compile with "
        'options={"tokens": "ragged"}.'
    )


class IdleProgram:
    """This graph's sites alone, on rows of zeros, for a rank that has nothing to do.

    The rank still multiplies its shards with the others' tokens. `module` takes those inputs of
    the step's graph that the sites need (shards, biases, scalars), at `positions`, and then one
    row count per token class.
    """

    def __init__(self, module: fx.GraphModule, positions: Sequence[int]):
        self._module = module
        self._positions = positions
        self._inputs: list[Any] = []

    def remember(self, inputs: Sequence[Any]) -> None:
        self._inputs = [inputs[position] for position in self._positions]

    @property
    def ready(self) -> bool:
        return len(self._inputs) == len(self._positions)

    def run(self, counts: Sequence[int]) -> None:
        with torch.no_grad():
            self._module(*self._inputs, *counts)


def idle_step(model: nn.Module) -> None:
    """Take part in one step of the group without tokens of one's own.

    model: the compiled model, or the module that was compiled. Call it on a rank that has no
    requests while the others of its group run a step. Every rank must have run one real step
    before. Raises AgreementError where that cannot work, on all ranks of the group.
    """
    parameters = sharded_parameters(model).values()
    steps = dict.fromkeys(_latest_step[p] for p in parameters if p in _latest_step)
    if not steps:
        raise AgreementError(
            "idle_step: this rank has no compiled step of this model. Run one real step on "
            "every rank first (a warm-up), so that all ranks shard the same weights."
        )
    for step in steps:
        _idle(step)


def _idle(step: Step) -> None:
    council = step.council
    if council is None:
        raise AgreementError(
            "idle_step needs the ranks to meet before each step: compile with check_tokens=True."
        )
    cards = council.meet(Act.IDLE, step.sites, (), None if step.idle.ready else "it never ran")
    busy = [card for card in cards if card.act is Act.STEP]
    _check_idle(cards)
    if not busy:
        return  # the whole group idles
    _check_same_sites([*busy, Card(0, Act.IDLE, step.sites, ())])
    counts = [max(column) for column in zip(*(card.tokens for card in busy), strict=True)]
    least = MINIMUM_ROWS if step.ragged else 0
    step.idle.run([max(count, least) for count in counts])

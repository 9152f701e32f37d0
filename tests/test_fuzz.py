"""A fixed part of what `make fuzz` does, and the smallest programs that once went wrong."""

import pytest
from fuzz.grammar import Attention, Case, Embedding, Ffn, Head, Layer, Matmul, Program
from fuzz.search import Judge, WrongError, search
from hypothesis.errors import UnsatisfiedAssumption


def _ffn(**fields: object) -> Program:
    return Program(layers=(Layer(attention=None, ffn=Ffn(**fields)),))  # type: ignore[arg-type]


FOUND = {
    "gate reads a lossy copy": Case(_ffn(gate="separate", gate_reads="float8")),
    "gate reads a rounded copy": Case(_ffn(gate="separate", gate_reads="int8")),
    "divisor updated before down": Case(_ffn(operand="buffer", before_down="buffer")),
    "running maximum before down": Case(_ffn(operand="element", before_down="running maximum")),
    "tokens by a floor division": Case(
        Program(layers=(Layer(tokens="every other"),)),
        dynamic=True,
        calls=(((2, 6),) * 3, ((2, 9),) * 3),
    ),
    "pooled tokens": Case(
        Program(layers=(Layer(tokens="pool"),)), dynamic=True, calls=(((2, 7),) * 3,)
    ),
    "as many sequences as tokens": Case(dynamic=True, calls=(((5, 5),) * 3, ((3, 3),) * 3)),
    "a batch of one on one rank": Case(
        contract="ragged", calls=(((1, 4), (3, 4), (2, 4)), ((2, 5), (1, 5), (1, 1)))
    ),
    "one token on one rank": Case(
        Program(), contract="ragged", dynamic=True, calls=(((1, 1), (2, 6), (2, 6)),)
    ),
    "two heads, all tokens and the last, of one token on one rank": Case(
        Program(layers=(), head=Head(reads="last"), extra="second head"),
        contract="ragged",
        calls=(((1, 1), (2, 3), None),),
    ),
    "two heads, the second of them behind the table": Case(
        Program(layers=(), head=Head(reads="last"), extra="second head", second=Head(reads="all")),
        ranks=2,
        calls=((None, (2, 5), None),),
    ),
    "flat up, a batch of one on one rank": Case(
        Program(
            layers=(Layer(attention=None, ffn=Ffn(up=Matmul(spelling="flat"))),),
            head=Head(reads="last"),
        ),
        contract="ragged",
        dynamic=True,
        calls=(((1, 4), (2, 4), None),),
    ),
    "a buffer that an idle rank does not change scales inner features": Case(
        Program(
            layers=(
                Layer(
                    attention=None,
                    ffn=Ffn(gate="none", operand="element", before_gate="buffer by foreach"),
                ),
            ),
        ),
        contract="ragged",
        dynamic=True,
        calls=(((3, 7), None, None), (None, (3, 4), None), ((2, 2), None, None)),
    ),
    "pooled pairs, one of them": Case(
        Program(layers=(Layer(tokens="mean of pairs"),)), dynamic=True, calls=(((1, 2),) * 3,)
    ),
    "pooled pairs, none of them": Case(
        Program(
            layers=(
                Layer(attention=None, ffn=None, tokens="mean of pairs"),
                Layer(attention=Attention(), ffn=None),
            )
        ),
        ranks=2,
        calls=(((1, 1), None, None),),
    ),
    "a buffer of one number changes": Case(
        Program(embedding=Embedding(write="buffer"), layers=(Layer(),)),
        ranks=2,
        dynamic=True,
        calls=(((2, 6),) * 3, ((1, 1), None, None)),
    ),
    "a sum that Dynamo spells in two ways": Case(
        Program(
            embedding=Embedding(positions="sinusoidal"),
            layers=(Layer(attention=None, ffn=Ffn(up=Matmul(spelling="x @ W", bias=True))),),
        ),
        contract="ragged",
        dynamic=True,
        calls=(((1, 6), (2, 6), None), ((1, 4), (4, 9), None), ((2, 4), (4, 9), None)),
    ),
    "an inner shape is read, of one pair on one rank": Case(
        Program(
            layers=(
                Layer(attention=None, ffn=None, tokens="mean of pairs"),
                Layer(attention=None, ffn=Ffn(operand="buffer", down_reads="view")),
            )
        ),
        contract="ragged",
        dynamic=True,
        calls=(((4, 3), (2, 6), None),),
    ),
    "q and o are one weight": Case(
        Program(layers=(Layer(attention=Attention(o=Matmul(shared=True)), ffn=None),))
    ),
    "an idle rank": Case(
        Program(embedding=Embedding(positions="learned")),
        ranks=3,
        contract="ragged",
        calls=(((1, 4), (3, 4), (2, 1)), (None, (2, 1), (1, 3))),
    ),
}


@pytest.fixture(scope="module")
def judge():  # type: ignore[no-untyped-def]
    judge = Judge()
    yield judge
    judge.close()


def test_what_once_went_wrong(judge: Judge) -> None:
    wrong = {}
    for name, case in FOUND.items():
        try:
            judge(case)
        except WrongError as error:
            wrong[name] = str(error)
        except UnsatisfiedAssumption:
            wrong[name] = "it does not run without the pass"
    assert not wrong
    assert judge.seen.sites["embedding"] >= len(FOUND)


def test_invented_decoders(judge: Judge) -> None:
    """Of one seed; `make fuzz` tries others, for as long as it is told to."""
    before, examples = sum(judge.seen.sites.values()), 28
    assert search(judge, 1, examples) == ""
    assert sum(judge.seen.sites.values()) - before > examples, "hardly anything was cut"

"""Strategies for programs and cases: mostly plain, odd in a few places."""

import typing
from typing import Any

from fuzz.grammar import Case, Layer, Program, Write
from hypothesis import strategies as st

# How often a field takes its first, plain value; a model that is odd everywhere has no sites.
_PLAIN, _UNWRITTEN = 0.7, 0.92


def programs() -> st.SearchStrategy[Program]:
    return _of(Program)


def cases() -> st.SearchStrategy[Case]:
    shape = st.tuples(st.integers(1, 5), st.integers(1, 9))
    one = st.one_of(shape, shape, shape, shape, st.none())
    calls = st.lists(st.tuples(one, one, one), min_size=1, max_size=3).map(tuple)
    return st.builds(
        Case,
        program=programs(),
        ranks=st.sampled_from([2, 3]),
        contract=st.sampled_from(["equal", "ragged"]),
        dynamic=st.sampled_from([None, True, False]),
        inner=st.sampled_from(["eager"] * 4 + ["aot_eager"]),
        calls=calls,
        six=st.booleans(),
    )


def _of(kind: type) -> st.SearchStrategy[Any]:
    hints = typing.get_type_hints(kind)
    return st.builds(kind, **{name: _value(hint) for name, hint in hints.items()})


def _value(hint: Any) -> st.SearchStrategy[Any]:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is bool:
        return st.sampled_from([False] * 3 + [True])
    if origin is typing.Literal:
        share = _UNWRITTEN if hint == Write else _PLAIN
        first, *others = arguments
        plain = round(len(others) * share / (1 - share))
        return st.sampled_from([first] * max(1, plain) + others)
    if origin is tuple:
        return st.lists(_of(Layer), min_size=0, max_size=2).map(tuple)
    if type(None) in arguments:
        part = _of(next(kind for kind in arguments if kind is not type(None)))
        return st.one_of(*[part] * 5, st.none())
    return _of(hint)

"""Hypothesis strategies for what goes into a handler: fields of the vocabulary, and all arguments of a module."""

from __future__ import annotations

from hypothesis import strategies as st

from pointcall_runbook import ModuleInfo, Parameter, Slot
from pointcall_runbook.vocabulary import EVENTS, Action, Event, Field, Kind, fields, from_slots


def integers(lo: int, hi: int) -> st.SearchStrategy[int]:
    """Within `lo..hi`: small numbers and both ends more often than chance would give."""
    near = st.integers(lo, min(hi, lo + 12))
    return st.one_of(near, st.sampled_from(sorted({lo, hi, max(lo, hi - 1)})), st.integers(lo, hi))


def raw(field: Field) -> st.SearchStrategy[tuple[int, ...]]:
    """The i64 of one field."""
    return st.tuples(*[integers(field.lo, field.hi)] * (2 if field.kind is Kind.ADDRESS else 1))


def raws(cls: type[Event] | type[Action]) -> st.SearchStrategy[tuple[int, ...]]:
    """The i64 of a whole event or action."""
    return st.tuples(*[raw(f) for f in fields(cls)]).map(lambda parts: tuple(n for part in parts for n in part))


def typed(cls: type[Event] | type[Action]) -> st.SearchStrategy[Event | Action]:
    """An event or action of a type."""
    return raws(cls).map(lambda values: from_slots(cls, values))


def arguments(info: ModuleInfo, event: str) -> st.SearchStrategy[tuple[int, ...]]:
    """Everything that a handler takes: event, parameters, remembered slots."""
    rows: tuple[Parameter | Slot, ...] = (*info.parameters, *info.slots)
    settings = st.tuples(*[integers(row.lo, row.hi) for row in rows])
    return st.tuples(raws(EVENTS[event]), settings).map(lambda pair: (*pair[0], *pair[1]))

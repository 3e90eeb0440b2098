"""The control mapping: which answers stand for which control of which framework. Data in, rows out.

It says what the log answers, never that somebody complies. Spec: docs/spec/report.md section 5.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from typing import Annotated, Final

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from pointcall_attest.errors import MalformedError
from pointcall_attest.report.model import Answer, ControlRow, FrameworkRow, Standing
from pointcall_attest.report.queries import QUERIES

MAX_MAPPING_BYTES: Final = 1024 * 1024  # ours has 8 kB

_Listed = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Control(_Strict):
    """One control. `read` overrides the framework's where given."""

    id: Annotated[str, Field(min_length=1, max_length=40)]
    title: Annotated[str, Field(min_length=1, max_length=200)]
    queries: Annotated[tuple[str, ...], _Listed]
    note: str = ""
    read: bool | None = None


class Framework(_Strict):
    """One framework and its controls, in the order in which they are shown."""

    name: str
    source: str
    read: bool
    controls: Annotated[tuple[Control, ...], _Listed]


class _Mapping(_Strict):
    framework: Annotated[tuple[Framework, ...], _Listed]


def parse(raw: bytes) -> tuple[Framework, ...]:
    """A mapping from TOML. MalformedError `report.mapping` for another form or an unknown query."""
    if len(raw) > MAX_MAPPING_BYTES:
        raise MalformedError("the mapping is too long", id="report.mapping", want=f"<= {MAX_MAPPING_BYTES} bytes")
    try:
        frameworks = _Mapping.model_validate(tomllib.loads(raw.decode())).framework
    except (ValidationError, tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as fault:
        raise MalformedError("not a control mapping", id="report.mapping", got=str(fault)[:300]) from None
    unknown = {q for f in frameworks for c in f.controls for q in c.queries} - set(QUERIES)
    if unknown:
        raise MalformedError(
            "unknown queries", id="report.mapping", want=", ".join(QUERIES), got=", ".join(sorted(unknown))
        )
    return frameworks


@cache
def shipped() -> tuple[Framework, ...]:
    """The mapping that lies beside this module."""
    return parse(resources.files(__package__).joinpath("controls.toml").read_bytes())


def judge(frameworks: Sequence[Framework], answers: Sequence[Answer]) -> tuple[FrameworkRow, ...]:
    """Each control with its standing."""
    by_id = {a.id: a for a in answers}
    return tuple(FrameworkRow(f.name, f.source, tuple(_row(f, c, by_id) for c in f.controls)) for f in frameworks)


def _row(framework: Framework, control: Control, answers: Mapping[str, Answer]) -> ControlRow:
    standings = {answers[q].standing for q in control.queries}
    read = framework.read if control.read is None else control.read
    return ControlRow(control.id, control.title, _standing(standings), control.queries, control.note, read)


def _standing(standings: set[Standing]) -> Standing:
    if "not-satisfied" in standings:
        return "not-satisfied"
    return "no-data" if "no-data" in standings or not standings else "satisfied"

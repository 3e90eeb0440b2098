"""Untrusted text: everything that hides or reorders is found, and what is shown is safe to print."""

from __future__ import annotations

import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointcall_attest.printable import MAX_SHOWN_CHARS, hides, shown
from pointcall_executor.agent_api import text

HOSTILE = {
    "bidi override": "\u202e",
    "bidi isolate": "\u2066",
    "zero width space": "\u200b",
    "zero width joiner": "\u200d",
    "byte order mark": "\ufeff",
    "soft hyphen": "\u00ad",
    "tag letter": "\U000e0041",
    "variation selector": "\ufe0f",
    "variation selector 256": "\U000e01ef",
    "hangul filler": "\u3164",
    "braille blank": "\u2800",
    "line separator": "\u2028",
    "escape": "\x1b",
    "null": "\0",
    "carriage return": "\r",
    "next line": "\x85",
    "delete": "\x7f",
    "private use": "\ue000",
    "unassigned": "\U000e0fff",
    "lone surrogate": "\ud800",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_each_hostile_code_point_is_found_where_it_is(name: str) -> None:
    (found,) = text.findings(f"a = 1\n  b{HOSTILE[name]}c")
    assert (found.line, found.column, found.code_point) == (2, 4, ord(HOSTILE[name]))
    assert f"U+{ord(HOSTILE[name]):04X}" in str(found)


def test_every_control_and_format_code_point_is_refused() -> None:
    wanted = {c for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(c) in ("Cc", "Cf")} - {"\t", "\n"}
    assert len(wanted) > 200
    assert {c for c in wanted if not hides(c)} == set()


@pytest.mark.parametrize("plain", ["def on(e):\n\treturn []\n", "Größe, naïve, 日本語, Ελλάδα, emoji 🚂", ""])
def test_ordinary_text_passes(plain: str) -> None:
    assert text.findings(plain) == ()


def test_findings_are_capped() -> None:
    assert len(text.findings("\u202e" * 70_000)) == text.MAX_FINDINGS


@given(st.text(st.characters(), max_size=600))
def test_what_is_shown_can_be_shown(raw: str) -> None:
    safe = shown(raw)
    assert text.findings(safe) == ()
    assert "\n" not in safe
    assert "\t" not in safe
    assert len(safe) <= MAX_SHOWN_CHARS + 40
    safe.encode()


@given(st.text(st.characters(), max_size=60), st.text(st.characters(), max_size=60))
def test_two_short_texts_never_look_the_same(one: str, other: str) -> None:
    assert (shown(one, 10_000) == shown(other, 10_000)) == (one == other)


def test_a_long_text_says_what_is_missing() -> None:
    assert shown("x" * 300, 100) == "x" * 100 + " [200 more characters]"

"""Smallest rb1 modules, encoded by hand, so that these tests do not depend on the compiler."""

from __future__ import annotations

from collections.abc import Sequence

from pointcall_runbook import vocabulary
from pointcall_runbook.meta import Meta, Parameter

I64 = 0x7E


def _leb(n: int) -> bytes:
    out = bytearray()
    while n > 0x7F:
        out.append(n & 0x7F | 0x80)
        n >>= 7
    return bytes([*out, n])


def _vec(items: Sequence[bytes]) -> bytes:
    return _leb(len(items)) + b"".join(items)


def _name(text: str) -> bytes:
    return _leb(len(text)) + text.encode()


def _type(params: int) -> bytes:
    return b"\x60" + _vec([bytes([I64])] * params) + b"\x00"


def _section(number: int, body: bytes) -> bytes:
    return bytes([number]) + _leb(len(body)) + body


def module(
    event: str = "ProcessExited",
    action: str = "recreate",
    *,
    services: tuple[str, ...] = ("db",),
    channels: tuple[str, ...] = (),
    parameters: tuple[Parameter, ...] = (),
) -> bytes:
    """A module that answers `event` with one call of `action`, all of whose arguments are 1."""
    takes, given = vocabulary.arity(vocabulary.ACTIONS[action]), vocabulary.arity(vocabulary.EVENTS[event])
    code = b"\x00" + b"\x42\x01" * takes + b"\x10\x00\x0b"
    meta = Meta((event,), (action,), parameters, (), services, channels, None, None, vocabulary.digest()).encode()
    return (
        b"\x00asm\x01\x00\x00\x00"
        + _section(1, _vec([_type(takes), _type(given + len(parameters))]))
        + _section(2, _vec([_name("rb1") + _name(action) + b"\x00\x00"]))
        + _section(3, _vec([b"\x01"]))
        + _section(7, _vec([_name(f"decide_{event}") + b"\x00\x01"]))
        + _section(10, _vec([_leb(len(code)) + code]))
        + _section(0, _name("rb.meta") + meta)
    )

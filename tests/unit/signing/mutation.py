"""Changing one field of a JSON document."""

from __future__ import annotations

import base64
import copy
import json
from collections.abc import Iterator
from typing import Any

Path = tuple[Any, ...]


def leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every value that is no object and no list, with where it is."""
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(item, (*path, key))
    else:
        yield path, value


def members(value: Any, path: Path = ()) -> Iterator[Path]:
    """Where every member and item is, at every depth."""
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield (*path, key)
            yield from members(item, (*path, key))


def flip(value: Any) -> Any:
    """Another value of the same form: one bit in the middle of base64, the next number, a letter in front."""
    if not isinstance(value, str):
        return value + 1 if isinstance(value, int) else value
    try:
        raw = bytearray(base64.b64decode(value, validate=True))
    except ValueError:
        raw = bytearray()
    if len(raw) > 8:
        raw[len(raw) // 2] ^= 1
        return base64.b64encode(raw).decode()
    return str(int(value) + 1) if value.isdigit() else "X" + value


def replaced(value: Any, path: Path, new: Any) -> bytes:
    """The document with one value replaced, as JSON."""
    changed = copy.deepcopy(value)
    parent = changed
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = new
    return json.dumps(changed).encode()


def dropped(value: Any, path: Path) -> bytes:
    """The document without one member, as JSON."""
    changed = copy.deepcopy(value)
    parent = changed
    for key in path[:-1]:
        parent = parent[key]
    del parent[path[-1]]
    return json.dumps(changed).encode()

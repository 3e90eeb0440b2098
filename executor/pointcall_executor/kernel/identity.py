"""What a loaded sensor is, as the kernel itself reports it: recorded at arming, compared again later.

Somebody with the right privileges can swap the program behind a link, or detach it. Neither needs our descriptors, and
neither is an error anywhere: only comparing shows it. Spec: docs/spec/kernel-abi.md section 11.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from pointcall_executor.kernel import bpf
from pointcall_executor.kernel.loader import Loaded


@dataclass(frozen=True, slots=True)
class Program:
    """A program's kernel id and tag. The tag hashes its relocated instructions: not comparable across kernels."""

    name: str
    id: int
    tag: str


@dataclass(frozen=True, slots=True)
class Link:
    """A link: which program it runs now, and on which cgroup (0 for a tracepoint)."""

    name: str
    id: int
    program_id: int
    cgroup: int


@dataclass(frozen=True, slots=True)
class Identity:
    """All of it. `constants`: SHA-256 of the read-only data that the programs were verified with. `map_hash`: the
    kernel's own SHA-256 of that map (padded with zeros to 8 bytes), empty where it makes none (before 6.18)."""

    blob: str
    constants: str
    map_hash: str
    programs: tuple[Program, ...]
    links: tuple[Link, ...]

    def as_dict(self) -> dict[str, Any]:
        """For a receipt or a file beside the pins."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Self:
        """The inverse of `as_dict`. KeyError, TypeError or ValueError where the form is another one."""
        programs = tuple(Program(str(p["name"]), int(p["id"]), str(p["tag"])) for p in value["programs"])
        links = tuple(
            Link(str(k["name"]), int(k["id"]), int(k["program_id"]), int(k["cgroup"])) for k in value["links"]
        )
        return cls(str(value["blob"]), str(value["constants"]), str(value["map_hash"]), programs, links)


def read(blob_sha256: str, loaded: Loaded, links: Mapping[str, int]) -> Identity:
    """Ask the kernel, now."""
    infos = {name: bpf.program_info(fd) for name, fd in sorted(loaded.programs.items())}
    held = {name: bpf.link_info(fd) for name, fd in sorted(links.items())}
    return Identity(
        blob_sha256,
        *_constants(loaded),
        tuple(Program(name, info.id, info.tag) for name, info in infos.items()),
        tuple(Link(name, info.id, info.program_id, info.target) for name, info in held.items()),
    )


def differences(expected: Identity, now: Identity) -> list[str]:
    """What changed, one plain line each; empty where nothing did."""
    found = []
    if (expected.blob, expected.constants) != (now.blob, now.constants):
        found.append("the blob or its constants are other ones")
    if expected.map_hash != now.map_hash:
        found.append(f"the kernel's hash of the constants: was {expected.map_hash}, is {now.map_hash}")
    found += _changed("program", {p.name: p for p in expected.programs}, {p.name: p for p in now.programs})
    found += _changed("link", {k.name: k for k in expected.links}, {k.name: k for k in now.links})
    return found


def _changed(what: str, before: Mapping[str, object], after: Mapping[str, object]) -> list[str]:
    names = sorted(before.keys() | after.keys())
    return [
        f"{what} {name}: was {before.get(name)}, is {after.get(name)}"
        for name in names
        if before.get(name) != after.get(name)
    ]


def _constants(loaded: Loaded) -> tuple[str, str]:
    fd = loaded.maps.get("rodata")
    if fd is None:
        return hashlib.sha256(b"").hexdigest(), ""
    raw = bpf.map_lookup(fd, bytes(4), bpf.map_info(fd).value_size)
    return hashlib.sha256(raw).hexdigest(), bpf.map_hash(fd) or ""

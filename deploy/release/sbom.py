"""The bill of materials of a release: what the wheel holds beside our code, what is installed with it. CycloneDX 1.6.

Pinned versions and who needs whom come from requirements.txt, as `make lock` wrote it; files of the wheel that are no
source come with their digests. The same release always gives the same bytes. Spec: CycloneDX 1.6; docs/spec/release.md.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import re
import tomllib
import uuid
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cyclonedx.model import ExternalReference, ExternalReferenceType, HashAlgorithm, HashType, XsUri
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.model.license import LicenseExpression
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL

RUN_EXTRAS: Final = ("executor",)  # what `make demo` and CI install; the others are for developers and fleets
_PIN = re.compile(r"^([A-Za-z0-9._-]+)==(\S+)")
_NAME = re.compile(r"[A-Za-z0-9._-]+")


@dataclass(frozen=True, slots=True)
class Pin:
    """One line of requirements.txt: its version, and which packages brought it in (`pointcall` for our own needs)."""

    version: str
    via: frozenset[str]


def pins(requirements: str) -> dict[str, Pin]:
    """Every pinned package by its name, with the comments that pip-compile left."""
    found: dict[str, tuple[str, set[str]]] = {}
    name = ""
    for line in requirements.splitlines():
        if pin := _PIN.match(line):
            name = _plain(pin[1])
            found[name] = (pin[2], set())
        elif line.strip().startswith("# ") and name:
            words = line.strip().removeprefix("# ").removeprefix("via").split()
            found[name][1].update(_plain(words[0]) for _ in words[:1])
    return {name: Pin(version, frozenset(via)) for name, (version, via) in found.items()}


def needed(project: Mapping[str, object], locked: Mapping[str, Pin]) -> dict[str, Pin]:
    """The packages that a run needs, out of those that are locked: our own needs and, step by step, theirs."""
    extras = project["optional-dependencies"]
    assert isinstance(extras, dict), "pyproject.toml has extras"
    own = project["dependencies"]
    assert isinstance(own, list), "pyproject.toml has dependencies"
    asked = [*own, *(need for extra in RUN_EXTRAS for need in extras[extra])]
    todo, seen = [_plain(found[0]) for need in asked if (found := _NAME.match(need))], set[str]()
    while todo:
        name = todo.pop()
        if name not in seen and name in locked:
            seen.add(name)
            todo += [other for other, pin in locked.items() if name in pin.via]
    return {name: locked[name] for name in sorted(seen)}


def bill(tree: Path, sdist: Path, wheel: Path, at: dt.datetime) -> bytes:
    """CycloneDX JSON for the two files, built from the sources in `tree` at the time of their commit."""
    project = tomllib.loads((tree / "pyproject.toml").read_text())["project"]
    packages = needed(project, pins((tree / "requirements.txt").read_text()))
    root = _root(project, [sdist, wheel])
    parts = {name: _package(name, pin) for name, pin in packages.items()}
    bom = Bom(components=[*parts.values(), *_made(wheel)], serial_number=_serial(wheel))
    bom.metadata.component, bom.metadata.timestamp = root, at
    bom.register_dependency(root, [parts[name] for name in parts if "pointcall" in packages[name].via])
    for name, part in parts.items():
        bom.register_dependency(part, [parts[n] for n, pin in packages.items() if name in pin.via])
    return (JsonV1Dot6(bom).output_as_string(indent=1) + "\n").encode()


def _root(project: Mapping[str, object], files: Iterable[Path]) -> Component:
    name, version = str(project["name"]), str(project["version"])
    references = [
        ExternalReference(type=ExternalReferenceType.DISTRIBUTION, url=XsUri(f.name), hashes=[_sha256(f.read_bytes())])
        for f in files
    ]
    return Component(
        type=ComponentType.APPLICATION,
        name=name,
        version=version,
        bom_ref=f"{name}@{version}",
        purl=PackageURL("pypi", name=name, version=version),
        licenses=[LicenseExpression(str(project["license"]))],
        external_references=references,
    )


def _package(name: str, pin: Pin) -> Component:
    return Component(
        type=ComponentType.LIBRARY,
        name=name,
        version=pin.version,
        bom_ref=f"{name}@{pin.version}",
        purl=PackageURL("pypi", name=name, version=pin.version),
    )


def _made(wheel: Path) -> list[Component]:
    """What lies in the wheel and is no Python source: BPF blobs, roots, library. By digest, as manifests pin blobs."""
    with zipfile.ZipFile(wheel) as archive:
        names = sorted(n for n in archive.namelist() if not n.endswith(".py") and ".dist-info/" not in n)
        return [
            Component(type=ComponentType.FILE, name=name, bom_ref=name, hashes=[_sha256(archive.read(name))])
            for name in names
        ]


def _sha256(content: bytes) -> HashType:
    return HashType(alg=HashAlgorithm.SHA_256, content=hashlib.sha256(content).hexdigest())


def _serial(wheel: Path) -> uuid.UUID:
    return uuid.uuid5(uuid.NAMESPACE_OID, hashlib.sha256(wheel.read_bytes()).hexdigest())


def _plain(name: str) -> str:
    """As package indexes compare names."""
    return re.sub(r"[-_.]+", "-", name).lower()

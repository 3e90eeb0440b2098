"""Assembling: a RecoveryManifest and the files beside it become one statement to sign and the files that it names.

Deterministic: the same sources, blobs, sequence and dates give the same bytes. It reads files and signs nothing.
Spec: docs/spec/manifest.md, section Assembling.
"""

from __future__ import annotations

import datetime as dt
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from pointcall_attest.declaration import ServiceDeclaration
from pointcall_attest.errors import MalformedError
from pointcall_attest.manifest import FORMAT, WITHOUT_BLOB, Predicate, Runbook, Sensor, Service, build_statement
from pointcall_keys.errors import KeysError
from pointcall_keys.recovery_manifest import RecoveryManifest, RunbookSource, SensorSource, ServiceSource
from pointcall_runbook import vocabulary
from pointcall_runbook.module import verify_module

MAX_FILE_BYTES: Final = 16 * 1024 * 1024  # BPF blobs are tens of KiB
SOURCE_FILE: Final = "runbook.py"


@dataclass(frozen=True, slots=True)
class Assembled:
    """The statement to sign, in canonical form, and every file that it names."""

    statement: bytes
    files: Mapping[str, bytes]

    def write(self, directory: Path) -> None:
        """manifest.json and files/<subject name>; the folder is made, files of an earlier build are overwritten."""
        for name, content in self.files.items():
            path = directory / "files" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        (directory / "manifest.json").write_bytes(self.statement)


def assemble(
    manifest: RecoveryManifest,
    base_dir: Path,
    blobs_dir: Path,
    *,
    sequence: int,
    not_before: dt.datetime,
    expires: dt.datetime,
    previous: str | None = None,
) -> Assembled:
    """Compile, collect and describe everything that `manifest` names.

    Paths in it are relative to `base_dir` and cannot leave it; blobs are `<blobs_dir>/<name>.blob`. `previous` is the
    SHA-256 (hex) of the payload that this one replaces. KeysError `build.file` for a file that cannot be read,
    MalformedError `build.malformed` where the parts do not fit together; the compiler's and verifier's own errors pass.
    """
    files: dict[str, bytes] = {}
    spec = manifest.spec
    runbooks = [_runbook(row, base_dir, files) for row in spec.runbooks]
    sensors = [_sensor(row, blobs_dir, files) for row in spec.sensors]
    services = [_service(row, base_dir, files) for row in spec.services]
    try:
        predicate = Predicate(
            format=FORMAT,
            name=manifest.metadata.name,
            sequence=sequence,
            previous=previous,
            not_before=not_before,
            expires=expires,
            vocabulary=vocabulary.digest(),
            runbooks=tuple(runbooks),
            sensors=tuple(sensors),
            services=tuple(services),
            channels=spec.channels,
            guard=spec.guard,
            reference_values=spec.reference_values,
            min_executor=spec.min_executor,
            policy_sha256=spec.policy_sha256,
            trusted_root_sha256=spec.trusted_root_sha256,
            revoked=spec.revoked,
        )
    except ValidationError as error:
        raise MalformedError(
            f"the parts do not fit together: {error.errors(include_url=False)[0]['msg']}", id="build.malformed"
        ) from None
    if not files:
        raise MalformedError("the manifest names nothing", id="build.malformed", want="a runbook, sensor or service")
    return Assembled(build_statement(files, predicate), files)


def _runbook(row: RunbookSource, base_dir: Path, files: dict[str, bytes]) -> Runbook:
    wasm, name = _module(row, base_dir), f"modules/{row.name}.wasm"
    info = verify_module(wasm)
    files[name] = wasm
    return Runbook(
        name=row.name,
        version=row.version,
        module=name,
        events=row.events or tuple(sorted(info.handlers)),
        grants=row.grants,
        limits=row.limits,
        parameters=row.parameters,
        mode=row.mode,
    )


def _module(row: RunbookSource, base_dir: Path) -> bytes:
    if (row.source is None) == (row.module is None):
        raise MalformedError(f"runbook {row.name} has one of `source` and `module`", id="build.malformed")
    if row.module is not None:
        return _read(base_dir, row.module)
    assert row.source is not None
    path = source_path(row.source)
    return compile_runbook(_read(base_dir, path), path)


def source_path(source: str) -> str:
    """The file that `source` of a runbook names: itself, or runbook.py in that folder."""
    return source if source.endswith(".py") else f"{source}/{SOURCE_FILE}"


def compile_runbook(source: bytes, path: str) -> bytes:
    """The module of a runbook's source. MalformedError if it is not UTF-8; CompileError for the rest."""
    from pointcall_runbook import compile_source

    try:
        text = source.decode()
    except UnicodeDecodeError:
        raise MalformedError(f"{path} is not UTF-8", id="build.malformed") from None
    return compile_source(text, path).wasm


def _sensor(row: SensorSource, blobs_dir: Path, files: dict[str, bytes]) -> Sensor:
    if row.name in WITHOUT_BLOB:
        if row.blob is not None:
            raise MalformedError(f"sensor {row.name} has no blob", id="build.malformed", got=row.blob)
        return Sensor(name=row.name, params=row.params)
    blob = row.blob or row.name
    name = f"blobs/{blob}.blob"
    files[name] = _read(blobs_dir, f"{blob}.blob")
    return Sensor(name=row.name, blob=name, params=row.params)


def _service(row: ServiceSource, base_dir: Path, files: dict[str, bytes]) -> Service:
    raw, name = _read(base_dir, row.declaration), f"services/{row.name}.json"
    declared = ServiceDeclaration.parse(raw)
    if (declared.name, declared.kind) != (row.name, row.kind):
        got, want = f"{declared.kind} {declared.name}", f"{row.kind} {row.name}"
        raise MalformedError(f"{row.declaration} declares {got}", id="build.malformed", want=want)
    files[name] = raw
    digest = hashlib.sha256(raw).hexdigest()
    return Service(name=row.name, kind=row.kind, declaration=name, digest=digest, listen=row.listen)


def _read(directory: Path, name: str) -> bytes:
    path = directory / name
    try:
        if not path.resolve(strict=True).is_relative_to(directory.resolve()):
            raise KeysError(
                "a file lies outside its folder", id="build.file", got=name, hint="copy it in, no links out"
            )
        if path.stat().st_size > MAX_FILE_BYTES:
            raise KeysError("a file is too large", id="build.file", want=f"<= {MAX_FILE_BYTES} bytes", got=name)
        return path.read_bytes()
    except OSError as error:
        raise KeysError("a file cannot be read", id="build.file", want=str(path), got=error.strerror or "") from None

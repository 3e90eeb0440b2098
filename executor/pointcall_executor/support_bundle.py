"""A support bundle: what somebody elsewhere needs to understand this node, and nothing that is secret or personal.

Files are made from what is known, one by one; no folder is copied. Left out by construction: private keys, trust and
manifest files, the journal's bytes, clear texts behind commitments, output of services, the environment, command lines.
What is text from outside is escaped, and everything is looked through again: secrets by their forms, addresses of
people, host and user names become marks. Names, order and times in the archive are always the same.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import platform
import re
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from pointcall_attest.entry import Entry
from pointcall_attest.printable import shown
from pointcall_executor import VERSION
from pointcall_executor.config import ConfigError, load
from pointcall_executor.feed import Changes, page
from pointcall_executor.journal_reader import JournalReader
from pointcall_runbook.errors import PointcallError

MAX_FILE_BYTES: Final = 4 * 1024 * 1024
FEED_ITEMS: Final = 1000
LIBRARIES: Final = ("cryptography", "grpcio", "pydantic", "sigstore", "wasmtime", "textual", "prometheus-client")
FOLDER: Final = "pointcall-support"
_KEPT_SETTINGS_OUT: Final = frozenset({"mtls", "otlp", "mirror"})  # paths of keys, addresses of other machines

# What secrets and people look like.
_NAMES: Final = "password|passwd|secret|token|api[_-]?key|authorization"
_PRIVATE: Final = "[A-Z ]*PRIVATE[ ]KEY-----"
_FORMS: Final = (
    ("private-key", re.compile(rf"-----BEGIN {_PRIVATE}.*?(?:-----END {_PRIVATE}|\Z)", re.DOTALL)),
    ("token", re.compile(r"(?i)\b(?:bearer|basic)\s+[A-Za-z0-9._~+/=-]{6,}")),
    ("token", re.compile(r"\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]+\.?[A-Za-z0-9_-]*")),
    ("token", re.compile(r"\b(?:gh[pousr]_|glpat-|xox[baprs]-|sk-|AKIA|ASIA)[A-Za-z0-9_-]{12,}")),
    ("secret", re.compile(rf"(?i)(?:{_NAMES}|bearer)[\"']?\s*[:=]\s*[\"']?[^\s\"',;}}]+")),
    ("credentials", re.compile(r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)")),
    ("person", re.compile(r"\b[A-Za-z0-9._%+-]+@[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)*\.[A-Za-z]{2,}\b")),
)  # fmt: skip

_SECRET_NAME: Final = re.compile(rf"(?i){_NAMES}|private")


@dataclass(frozen=True, slots=True)
class Content:
    """One file of the bundle, as it is written."""

    name: str
    data: bytes


def redacted(text: str, names: Mapping[str, str] | None = None) -> str:
    """The text with a mark for every secret, address of a person, and name in `names` (name -> mark)."""
    for mark, form in _FORMS:
        text = form.sub(f"[{mark} removed]", text)
    for name, mark in (names or {}).items():
        if len(name) > 2:
            text = re.sub(rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])", mark, text)
    return text


def collect(state: Path, config: Path | None, features: list[Any], status: Callable[[], Any]) -> list[Content]:
    """Every file of the bundle. What cannot be read says so in its place. `status`: the executor's answer as values."""
    made: dict[str, Callable[[], Any]] = {
        "about.json": _about,
        "kernel.json": lambda: [asdict(feature) for feature in features],
        "machine.json": _machine,
        "settings.json": lambda: _settings(config),
        "status.json": status,
        "state-folder.json": lambda: _listing(state),
        "log/summary.json": lambda: _with_log(state, _summary),
        "log/feed.jsonl": lambda: _with_log(state, _feed),
        "log/refusals.jsonl": lambda: _with_log(state, _refusals),
    }
    names = {platform.node(): "[host]", str(Path.home()): "[home]"}
    return [Content(name, _bytes(name, make, names)) for name, make in sorted(made.items())]


def _bytes(name: str, make: Callable[[], Any], names: Mapping[str, str]) -> bytes:
    try:
        value = make()
    except (PointcallError, OSError, ValueError) as error:
        value = error.as_dict() if isinstance(error, PointcallError) else {"error": str(error)}
        value = [value] if name.endswith(".jsonl") else value
    clean = _clean(value, names)
    if name.endswith(".jsonl"):
        text = "".join(json.dumps(row, sort_keys=True) + "\n" for row in clean)
    else:
        text = json.dumps(clean, indent=1, sort_keys=True) + "\n"
    return text.encode()[:MAX_FILE_BYTES]


def _clean(value: Any, names: Mapping[str, str]) -> Any:
    """Every text in it redacted, and what a name says is secret taken out whatever it looks like."""
    match value:
        case str():
            return redacted(value, names)
        case dict():
            return {
                redacted(str(k), names): "[secret removed]" if _SECRET_NAME.search(str(k)) and v else _clean(v, names)
                for k, v in value.items()
            }
        case list() | tuple():
            return [_clean(v, names) for v in value]
        case _:
            return value


def archive(contents: list[Content]) -> bytes:
    """A .tar.gz of them: the same contents give the same bytes."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for content in sorted(contents, key=lambda c: c.name):
            info = tarfile.TarInfo(f"{FOLDER}/{content.name}")
            info.size, info.mode = len(content.data), 0o644
            tar.addfile(info, io.BytesIO(content.data))
    return gzip.compress(packed.getvalue(), mtime=0)


def write(path: Path, contents: list[Content]) -> int:
    """Write the archive, readable by its owner only; its size. FileExistsError where something is there."""
    data = archive(contents)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
    return len(data)


# ---- what is in it ---------------------------------------------------------------------------------------------------


def _about() -> dict[str, Any]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return {"pointcall": VERSION, "python": platform.python_version(), "libraries": found}


def _machine() -> dict[str, Any]:
    """Of /proc only what is the same for everybody who logs in."""
    memory = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    mounts = sorted({line.split()[2] for line in Path("/proc/self/mounts").read_text().splitlines()})
    return {
        "kernel": platform.release(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "memory": {name: memory[name].strip() for name in ("MemTotal", "MemAvailable") if name in memory},
        "load": Path("/proc/loadavg").read_text().split()[:3],
        "file systems": mounts,
        "uptime_s": float(Path("/proc/uptime").read_text().split()[0]),
    }


def _settings(path: Path | None) -> dict[str, Any]:
    """As they are in effect. Of those that name keys or other machines only whether they are set."""
    try:
        config = load(path, {})
    except ConfigError as error:
        return {"refused": error.id, "want": error.want}
    values = config.model_dump(mode="json")
    return {k: ("set" if v else "not set") if k in _KEPT_SETTINGS_OUT else v for k, v in values.items()}


def _listing(state: Path) -> list[dict[str, Any]]:
    """Names, sizes and modes below the state folder, never contents. Names of runs and services are in the log too."""
    rows = []
    for path in sorted(state.rglob("*")):
        about = path.lstat()
        kind = "folder" if path.is_dir() else "link" if path.is_symlink() else "file"
        name = shown(str(path.relative_to(state)))
        rows.append({"name": name, "kind": kind, "bytes": about.st_size, "mode": oct(about.st_mode & 0o7777)})
        if len(rows) == FEED_ITEMS:
            break
    return rows


def _with_log(state: Path, make: Callable[[JournalReader], Any]) -> Any:
    with JournalReader.open(state / "journal.db") as reader:
        return make(reader)


def _summary(reader: JournalReader) -> dict[str, Any]:
    head = reader.head()
    kinds = ("receipt", "refusal", "lost", "config", "epoch-open", "epoch-close", "proposal", "access")
    return {
        "entries": reader.size,
        "kinds": {kind: reader.count(kind) for kind in kinds},
        "signed": head.size if head else 0,
        "root": head.root.hex() if head else "",
        "minimum": reader.minimum,
    }


def _feed(reader: JournalReader) -> list[dict[str, Any]]:
    return [asdict(item) for item in page(reader, Changes("0" * 16, int), "", FEED_ITEMS).items][-FEED_ITEMS:]


def _refusals(reader: JournalReader) -> list[dict[str, str]]:
    found: list[Entry] = reader.entries("refusal", start=max(0, reader.size - 10_000), limit=FEED_ITEMS)
    return [{k: shown(str(v)) for k, v in entry.body.items()} | {"at": entry.at.isoformat()} for entry in found]

"""The notices folder of a node: signed pointers and revocations that reached it, as files. I/O only.

Trust: none. Every admission verifies what lies here. Who can write here can stop the node, since what is no notice is
refused; and can withhold notices, which a policy with `require_pointer` notices when the last pointer expires.
Spec: docs/spec/notice.md.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from pointcall_attest.signature import MAX_BUNDLE_BYTES

FOLDER: Final = "notices"  # below the state folder
PATTERN: Final = "*.sigstore.json"
MAX_FILES: Final = 256  # 32 notices of eight signatures


def read_notices(folder: Path) -> tuple[bytes, ...]:
    """The bundles in the folder, none if there is no folder.

    What cannot be read, the folder itself too, and what is beyond the number that a node takes, comes as an empty
    bundle: that verifies as nothing, and admission refuses. A longer file is cut where it is too long for a bundle.
    """
    try:
        next(folder.iterdir(), None)  # glob says of a folder that it may not read that nothing is in it
    except (FileNotFoundError, NotADirectoryError):
        return ()
    except OSError:
        return (b"",)
    paths = sorted(folder.glob(PATTERN))
    return tuple(_read(path) for path in paths[:MAX_FILES]) + (b"",) * (len(paths) > MAX_FILES)


def keep_notices(folder: Path, bundles: Iterable[bytes]) -> tuple[Path, ...]:
    """Put bundles into the folder, each whole or not at all, named by their digests: again is no harm."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = []
    for raw in bundles:
        path = folder / f"{hashlib.sha256(raw).hexdigest()}.sigstore.json"
        part = path.with_suffix(".part")
        with part.open("wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        kept.append(path)
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    return tuple(kept)


def drop_notices(folder: Path, bundles: Iterable[bytes]) -> None:
    """Remove these bundles, under whatever names they lie there."""
    gone = set(bundles)
    for path in sorted(folder.glob(PATTERN)):
        if _read(path) in gone:
            path.unlink()


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MAX_BUNDLE_BYTES + 1)
    except OSError:
        return b""

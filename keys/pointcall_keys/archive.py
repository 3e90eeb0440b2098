"""A release as one file: an OCI image layout in a tar, for sites that no network reaches. Deterministic; no trust.

Stock tools read and write the same form (`skopeo copy oci-archive:...`). Reading is strict: plain files only, every
size capped before it is read, every digest compared. Spec: OCI image-layout v1.0; docs/spec/release.md.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from typing import Final

from pointcall_attest import exact_json
from pointcall_attest.errors import MalformedError
from pointcall_keys.release import MANIFEST_TYPE, MAX_LAYER_BYTES, MAX_MANIFEST_BYTES, MAX_TOTAL_BYTES, Release, digest

LAYOUT: Final = b'{"imageLayoutVersion":"1.0.0"}'
MAX_ARCHIVE_BYTES: Final = MAX_TOTAL_BYTES + 4 * 1024 * 1024
MAX_MEMBERS: Final = 2048
_BLOB = re.compile(r"blobs/sha256/([0-9a-f]{64})")


def write_archive(release: Release) -> bytes:
    """The tar; the same release always gives the same bytes."""
    encoded = release.encode()
    entry = {"mediaType": MANIFEST_TYPE, "digest": encoded.digest, "size": len(encoded.image)}
    index = {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": [entry]}
    blobs = dict(encoded.blobs) | {encoded.digest: encoded.image}
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        _add(tar, "oci-layout", LAYOUT)
        _add(tar, "index.json", json.dumps(index, separators=(",", ":")).encode())
        for name in sorted(blobs):
            _add(tar, f"blobs/{name.replace(':', '/')}", blobs[name])
    return out.getvalue()


def read_archive(raw: bytes) -> tuple[str, Release]:
    """(digest of the OCI manifest, release). MalformedError `release.form` or `release.digest`."""
    if len(raw) > MAX_ARCHIVE_BYTES:
        raise MalformedError("the archive is too large", id="release.form", want=f"<= {MAX_ARCHIVE_BYTES} bytes")
    members = _members(raw)
    index = exact_json.loads(
        members.get("index.json", b""), id="release.form", max_bytes=MAX_MANIFEST_BYTES, what="the OCI index"
    )
    try:
        (entry,) = index["manifests"]
        wanted = str(entry["digest"])
    except (KeyError, TypeError, ValueError):
        raise MalformedError(
            "the archive holds one manifest", id="release.form", want="one entry in index.json"
        ) from None
    image = _fetch(members, wanted)
    return wanted, Release.decode(image, lambda name, _: _fetch(members, name))


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(content), 0o644
    tar.addfile(member, io.BytesIO(content))


def _members(raw: bytes) -> dict[str, bytes]:
    """Plain files by name; folders are passed over, everything else is refused. Nothing is ever unpacked to disk."""
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(raw), mode="r:") as tar:
            for number, member in enumerate(tar):
                if number >= MAX_MEMBERS or not (member.isreg() or member.isdir()) or member.size > MAX_LAYER_BYTES:
                    raise MalformedError(
                        "a member that a release does not have", id="release.form", got=member.name[:80]
                    )
                if member.isreg():
                    _take(tar, member, found)
    except (tarfile.TarError, ValueError, OverflowError, OSError) as error:
        raise MalformedError("not a tar", id="release.form", got=str(error)[:80]) from None
    return found


def _take(tar: tarfile.TarFile, member: tarfile.TarInfo, found: dict[str, bytes]) -> None:
    name = member.name.removeprefix("./")
    if name in found or (name not in ("oci-layout", "index.json") and not _BLOB.fullmatch(name)):
        raise MalformedError("a member that a release does not have", id="release.form", got=name[:80])
    file = tar.extractfile(member)
    assert file is not None, "a plain file can be read"
    found[name] = file.read()


def _fetch(members: dict[str, bytes], name: str) -> bytes:
    content = members.get(f"blobs/{name.replace(':', '/')}")
    if content is None or digest(content) != name:
        raise MalformedError("a blob is missing or is not what its name says", id="release.digest", want=name[:80])
    return content

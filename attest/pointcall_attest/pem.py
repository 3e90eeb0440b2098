"""PEM: text <-> DER, strictly. No I/O, no crypto. Spec: RFC 7468, strict form, text between blocks is tolerated."""

from __future__ import annotations

import binascii
import re
from typing import Final

from pointcall_attest.errors import MalformedError

MAX_BLOCKS: Final = 32  # a chain has three or four certificates
_BLOCK: Final = re.compile(
    rb"-----BEGIN ([A-Z0-9 ]{1,32})-----\r?\n([A-Za-z0-9+/=\r\n]*)-----END ([A-Z0-9 ]{1,32})-----"
)


def blocks(raw: bytes) -> list[tuple[str, bytes]]:
    """(label, DER) of every block; MalformedError `pem.malformed` where one is not whole or not base64."""
    found: list[tuple[str, bytes]] = []
    for match in _BLOCK.finditer(raw):
        begin, body, end = match.groups()
        if begin != end or len(found) == MAX_BLOCKS:
            raise MalformedError("not PEM", id="pem.malformed", want=f"matching labels, <= {MAX_BLOCKS} blocks")
        found.append((begin.decode(), _decoded(body)))
    if len(found) != raw.count(b"-----BEGIN "):
        raise MalformedError("a PEM block is not whole", id="pem.malformed", got=f"{len(found)} whole blocks")
    return found


def certificates(raw: bytes) -> list[bytes]:
    """The DER of every certificate in the text; MalformedError for other blocks or none."""
    found = blocks(raw)
    if not found or any(label != "CERTIFICATE" for label, _ in found):
        raise MalformedError("not certificates in PEM", id="pem.malformed", want="CERTIFICATE blocks only")
    return [der for _, der in found]


def _decoded(body: bytes) -> bytes:
    joined = body.replace(b"\r", b"").replace(b"\n", b"")
    try:
        decoded = binascii.a2b_base64(joined, strict_mode=True)
    except ValueError:
        decoded = b""
    if not decoded or binascii.b2a_base64(decoded, newline=False) != joined:
        raise MalformedError("a PEM block is not base64 in its one exact form", id="pem.malformed")
    return decoded


def encode(label: str, der: bytes) -> bytes:
    """One block with lines of 64 characters."""
    text = binascii.b2a_base64(der, newline=False)
    lines = b"\n".join(text[i : i + 64] for i in range(0, len(text), 64))
    name = label.encode()
    return b"-----BEGIN " + name + b"-----\n" + lines + b"\n-----END " + name + b"-----\n"

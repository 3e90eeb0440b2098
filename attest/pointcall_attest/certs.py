"""AMD certificates: DER <-> Certificate, and whether one key signed another. No I/O, no policy, no clock, no trust.

ARK (root), ASK and ASVK (intermediates), VCEK and VLEK (leaves that sign reports). Encodings are those that AMD
writes and no other. Both functions that cost time are memoised: they are pure functions of bytes.
Spec: AMD 57230; RFC 5280; RFC 4055 (RSASSA-PSS). docs/spec/snp.md, section Certificates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from typing import Final, Literal

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from pointcall_attest import der
from pointcall_attest.der import Reader, refused
from pointcall_attest.snp import Tcb
from pointcall_attest.tee_policy import Line

Kind = Literal["ARK", "ASK", "ASVK", "VCEK", "VLEK"]

MAX_CERTIFICATE_BYTES: Final = 8 * 1024  # 4x the largest real one
RSA_BITS: Final = 4096
LINES: Final[tuple[Line, ...]] = ("Milan", "Genoa", "Turin", "Venice")

_SHA384: Final = bytes.fromhex("300d06096086480165030402020500")
_PSS: Final = bytes.fromhex("06092a864886f70d01010a")
_PSS_SHAPE: Final = (
    der.write(der.explicit(0), _SHA384),
    der.write(der.explicit(1), der.write(der.SEQUENCE, bytes.fromhex("06092a864886f70d010108"), _SHA384)),
    der.write(der.explicit(2), der.write_integer(48)),
)
_TRAILER: Final = der.write(
    der.explicit(3), der.write_integer(1)
)  # the default, which DER leaves out and AMD's CAs write
PSS_ALGORITHM: Final = der.write(der.SEQUENCE, _PSS, der.write(der.SEQUENCE, *_PSS_SHAPE))
_PSS_ALGORITHMS: Final = (PSS_ALGORITHM, der.write(der.SEQUENCE, _PSS, der.write(der.SEQUENCE, *_PSS_SHAPE, _TRAILER)))
PSS: Final = padding.PSS(padding.MGF1(hashes.SHA384()), 48)

P384_SPKI: Final = bytes.fromhex("3076301006072a8648ce3d020106052b8104002203620004")  # then x and y, 48 bytes each
_V3: Final = bytes.fromhex("a003020102")

AMD: Final = "1.3.6.1.4.1.3704.1"
EMULATED_MARK: Final = "2.25.229763054263081497513362905416720813361"  # critical: every other verifier refuses it
EMULATED_ORGANIZATION: Final = "EMULATED - NOT AMD"
EMULATED_CHIP: Final = b"EMULATED"
_BASIC_CONSTRAINTS, _KEY_USAGE = "2.5.29.19", "2.5.29.15"
_OIDS: Final[Mapping[bytes, str]] = {
    der.write_oid(dotted)[2:]: dotted
    for dotted in (
        *(f"{AMD}.{x}" for x in ("1", "2", "3.1", "3.2", "3.3", "3.4", "3.5", "3.6", "3.7", "3.8", "3.9", "4", "5")),
        EMULATED_MARK,
        _BASIC_CONSTRAINTS,
        _KEY_USAGE,
    )
}
# keyCertSign with cRLSign (ARK); keyCertSign alone as AMD writes it, and in exact DER.
_CA_KEY_USAGES: Final = (bytes.fromhex("03020106"), bytes.fromhex("03020104"), bytes.fromhex("03020204"))
_ROOT_CONSTRAINTS: Final = bytes.fromhex("30030101ff")  # a CA
_INTERMEDIATE_CONSTRAINTS: Final = bytes.fromhex("30060101ff020100")  # a CA with no CA below it
_NAME_PARTS: Final[Mapping[bytes, str]] = {bytes.fromhex("55040a"): "O", bytes.fromhex("550403"): "CN"}
_CERTIFICATES_MEMOISED: Final = 256


@dataclass(frozen=True, slots=True)
class Leaf:
    """What the extensions of a VCEK or VLEK say. `hwid` only in a VCEK, `csp_id` only in a VLEK."""

    product: str
    line: Line
    tcb: Tcb
    hwid: bytes | None
    csp_id: str | None


@dataclass(frozen=True, slots=True)
class Certificate:
    """One certificate, well-formed and nothing more. `line` of a leaf is that of its issuer."""

    raw: bytes = field(repr=False)
    kind: Kind
    line: Line
    emulated: bool  # carries all marks of the emulated platform
    serial: int
    issuer: bytes = field(repr=False)
    subject: bytes = field(repr=False)
    subject_name: str
    not_before: datetime
    not_after: datetime
    spki: bytes = field(repr=False)
    leaf: Leaf | None
    tbs: bytes = field(repr=False)
    signature: bytes = field(repr=False)


@lru_cache(maxsize=_CERTIFICATES_MEMOISED)
def parse(raw: bytes) -> Certificate:
    """One ARK, ASK, ASVK, VCEK or VLEK in exact DER; MalformedError `cert.malformed` for anything else."""
    if len(raw) > MAX_CERTIFICATE_BYTES:
        raise refused("too long", want=f"<= {MAX_CERTIFICATE_BYTES} bytes", got=f"{len(raw)} bytes")
    outer = Reader(raw)
    body = outer.inside(der.SEQUENCE)
    outer.done()
    tbs = body.whole(der.SEQUENCE)
    algorithm, signature = body.whole(der.SEQUENCE), body.bits()
    body.done()
    if algorithm not in _PSS_ALGORITHMS:
        raise refused("another signature algorithm", want="RSASSA-PSS, SHA-384, salt 48")
    return _parse_tbs(raw, tbs, algorithm, signature)


def _parse_tbs(raw: bytes, tbs: bytes, algorithm: bytes, signature: bytes) -> Certificate:
    reader = Reader(tbs).inside(der.SEQUENCE)
    if reader.whole(der.explicit(0)) != _V3:
        raise refused("not version 3")
    serial = reader.integer()
    if reader.whole(der.SEQUENCE) != algorithm:
        raise refused("the two signature algorithms differ")
    issuer = reader.whole(der.SEQUENCE)
    dates = reader.inside(der.SEQUENCE)
    not_before, not_after = dates.time(), dates.time()
    dates.done()
    subject = reader.whole(der.SEQUENCE)
    spki = reader.whole(der.SEQUENCE)
    extensions = _extensions(reader.inside(der.explicit(3)))
    reader.done()
    names, issuer_names = name_parts(subject), name_parts(issuer)
    kind, line = _role(names["CN"], issuer_names["CN"])
    _check_role(kind, spki, extensions)
    leaf = _leaf(kind, extensions) if kind in ("VCEK", "VLEK") else None
    emulated = _is_emulated(names, issuer_names, extensions, leaf)
    return Certificate(
        raw,
        kind,
        line,
        emulated,
        serial,
        issuer,
        subject,
        names["CN"],
        not_before,
        not_after,
        spki,
        leaf,
        tbs,
        signature,
    )


@lru_cache(maxsize=_CERTIFICATES_MEMOISED)
def name_parts(raw: bytes) -> Mapping[str, str]:
    """Organization and common name; each part once, one value a part. Each name of a chain is there twice: memoised."""
    reader, parts = Reader(raw).inside(der.SEQUENCE), dict[str, str]()
    while reader.peek() is not None:
        pair = reader.inside(der.SET)
        inner = pair.inside(der.SEQUENCE)
        pair.done()
        oid = inner.value(der.OID)
        tag = der.PRINTABLE_STRING if inner.peek() == der.PRINTABLE_STRING else der.UTF8_STRING
        text = inner.value(tag).decode("latin-1")
        inner.done()
        if part := _NAME_PARTS.get(oid):
            if part in parts:
                raise refused("a name part occurs twice", got=part)
            parts[part] = text
    if set(parts) != {"O", "CN"}:
        raise refused("a name lacks its organization or common name")
    return parts


def _role(name: str, issuer: str) -> tuple[Kind, Line]:
    """What a certificate is, by its names. The chain and the extensions must then agree: names prove nothing."""
    name, issuer = name.removeprefix("EMULATED-"), issuer.removeprefix("EMULATED-")
    for line in LINES:
        match (name, issuer):
            case ("SEV-VCEK", by) if by == f"SEV-{line}":
                return "VCEK", line
            case ("SEV-VLEK", by) if by == f"SEV-VLEK-{line}":
                return "VLEK", line
            case (of, by) if by == f"ARK-{line}":
                for kind, form in (("ARK", "ARK-"), ("ASK", "SEV-"), ("ASVK", "SEV-VLEK-")):
                    if of == form + line:
                        return kind, line  # type: ignore[return-value]
            case _:
                pass
    raise refused("the names are not those of an AMD key", got=f"{name} issued by {issuer}")


def _extensions(reader: Reader) -> dict[str, tuple[bool, bytes]]:
    """Known extensions by OID: (critical, value). Unknown ones are skipped unless critical."""
    rows, found = reader.inside(der.SEQUENCE), dict[str, tuple[bool, bytes]]()
    reader.done()
    seen = set[bytes]()
    while rows.peek() is not None:
        row = rows.inside(der.SEQUENCE)
        oid = row.value(der.OID)
        critical = row.peek() == der.BOOLEAN and row.boolean()
        value = row.value(der.OCTET_STRING)
        row.done()
        if oid in seen:
            raise refused("an extension occurs twice", got=oid.hex())
        seen.add(oid)
        if dotted := _OIDS.get(oid):
            found[dotted] = (critical, value)
        elif critical:
            raise refused("a critical extension is not known", got=oid.hex())
    return found


def _check_role(kind: Kind, spki: bytes, extensions: Mapping[str, tuple[bool, bytes]]) -> None:
    if kind in ("VCEK", "VLEK"):
        if not (spki.startswith(P384_SPKI) and len(spki) == len(P384_SPKI) + 96):
            raise refused("the key is not an uncompressed P-384 point")
        if _BASIC_CONSTRAINTS in extensions or _KEY_USAGE in extensions:
            raise refused("a leaf has CA extensions")
        return
    wanted = _ROOT_CONSTRAINTS if kind == "ARK" else _INTERMEDIATE_CONSTRAINTS
    if extensions.get(_BASIC_CONSTRAINTS, (False, b""))[1] != wanted:
        raise refused("the basic constraints are not those of its role", want=wanted.hex())
    if extensions.get(_KEY_USAGE, (False, b""))[1] not in _CA_KEY_USAGES:
        raise refused("a CA whose key may not sign certificates")


def _leaf(kind: Kind, extensions: Mapping[str, tuple[bool, bytes]]) -> Leaf:
    numbers = {key: _small(extensions, key) for key in ("1", *(f"3.{i}" for i in range(1, 10)))}
    product = _text(extensions, "2")
    line = next((line for line in LINES if product == line or product.startswith(f"{line}-")), None)
    if line is None:
        raise refused("the product is not known", want=", ".join(LINES), got=product)
    with_fmc = line in ("Turin", "Venice")
    needed = {"1", "3.1", "3.2", "3.3", "3.8", *(("3.9",) if with_fmc else ())}
    if any(numbers[key] is None for key in needed) or (numbers["3.9"] is not None and not with_fmc):
        raise refused("the TCB extensions are not those of the product", got=product)
    if any(numbers[f"3.{i}"] for i in range(4, 8)):
        raise refused("a spare TCB part is not zero")
    tcb = Tcb(*(numbers[key] or 0 for key in ("3.9", "3.1", "3.2", "3.3", "3.8")))
    hwid, csp_id = _owner(kind, line, extensions)
    return Leaf(product, line, tcb, hwid, csp_id)


def _owner(kind: Kind, line: Line, extensions: Mapping[str, tuple[bool, bytes]]) -> tuple[bytes | None, str | None]:
    """Whom the key belongs to: a chip (VCEK) or a cloud provider (VLEK), never both."""
    hwid = extensions.get(f"{AMD}.4")
    csp = f"{AMD}.5" in extensions
    if (kind == "VCEK") != (hwid is not None) or (kind == "VLEK") != csp:
        raise refused("the owner is not named as the kind of key demands", want="HWID in a VCEK, CSP id in a VLEK")
    size = 8 if line in ("Turin", "Venice") else 64
    if hwid is not None and len(hwid[1]) != size:
        raise refused("the hardware id has a wrong length", want=f"{size} bytes", got=f"{len(hwid[1])} bytes")
    return (hwid[1] if hwid else None), (_text(extensions, "5") if csp else None)


def _small(extensions: Mapping[str, tuple[bool, bytes]], key: str) -> int | None:
    """An INTEGER 0 to 255, or None where the extension is absent."""
    found = extensions.get(f"{AMD}.{key}")
    if found is None:
        return None
    reader = Reader(found[1])
    value = reader.integer()
    reader.done()
    if value > 0xFF:
        raise refused("a version does not fit a byte", got=str(value))
    return value


def _text(extensions: Mapping[str, tuple[bool, bytes]], key: str) -> str:
    found = extensions.get(f"{AMD}.{key}")
    if found is None:
        raise refused("an extension is missing", want=f"{AMD}.{key}")
    reader = Reader(found[1])
    text = reader.value(der.IA5_STRING)
    reader.done()
    if not text or not all(0x20 <= c < 0x7F for c in text):
        raise refused("a text is not printable ASCII", got=text[:20].hex())
    return text.decode()


def _is_emulated(
    names: Mapping[str, str], issuer: Mapping[str, str], extensions: Mapping[str, tuple[bool, bytes]], leaf: Leaf | None
) -> bool:
    """True with every mark of the emulated platform, False with none; half-marked certificates are refused."""
    mark = extensions.get(EMULATED_MARK)
    if mark is not None and not mark[0]:
        raise refused("the mark of the emulated platform is not critical")
    marks = {
        mark is not None,
        *(name["O"] == EMULATED_ORGANIZATION for name in (names, issuer)),
        *(name["CN"].startswith("EMULATED-") for name in (names, issuer)),
    }
    if leaf is not None and leaf.hwid is not None:
        marks.add(leaf.hwid.startswith(EMULATED_CHIP))
    if len(marks) != 1:
        raise refused("it carries only some of the marks of the emulated platform")
    return marks.pop()


@lru_cache(maxsize=_CERTIFICATES_MEMOISED)
def _rsa_key(spki: bytes) -> rsa.RSAPublicKey | None:
    try:
        key = serialization.load_der_public_key(spki)
    except (ValueError, UnsupportedAlgorithm):
        return None
    usable = isinstance(key, rsa.RSAPublicKey) and key.key_size == RSA_BITS and key.public_numbers().e == 65537
    return key if usable and isinstance(key, rsa.RSAPublicKey) else None


@lru_cache(maxsize=_CERTIFICATES_MEMOISED)
def signed_by(issuer_spki: bytes, signature: bytes, signed: bytes) -> bool:
    """True where the RSA-4096 key signed these bytes with RSASSA-PSS as AMD does (RFC 4055; AMD 57230, 3)."""
    key = _rsa_key(issuer_spki)
    if key is None:
        return False
    try:
        key.verify(signature, signed, PSS, hashes.SHA384())
    except InvalidSignature:
        return False
    return True

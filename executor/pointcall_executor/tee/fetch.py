"""Certificates, CRLs and collateral from AMD KDS and Intel PCS: an optional step before verification, never part of it.

What comes back is not trusted: it goes into a file that `attest verify` judges like any other. Answers are kept on
disk until they expire; callers of one URL wait for each other; one server is asked at most every ten seconds, since AMD
answers more with 429. The cache is not trusted: who can write there can stop a verification, but not make one pass.
Spec: AMD 57230, section 4; Intel PCS API v4; docs/spec/evidence.md, section Fetching.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, TypeVar
from urllib.parse import unquote, urlsplit

from pointcall_attest import certs, collateral, crl, pck, pem, snp, tdx
from pointcall_attest.certificate_file import CertificateFile
from pointcall_attest.collateral import QeIdentity, TcbInfo
from pointcall_attest.errors import MalformedError
from pointcall_attest.snp import Report
from pointcall_attest.tee_policy import Line
from pointcall_runbook.errors import PointcallError

KDS: Final = "https://kdsintf.amd.com"
PCS: Final = "https://api.trustedservices.intel.com"
INTEL_ROOT_CRL: Final = "https://certificates.trustedservices.intel.com/IntelSGXRootCA.der"
SPACING: Final = timedelta(seconds=10)  # AMD KDS: one VCEK for each address in ten seconds
TIMEOUT_S: Final = 20.0
MAX_ANSWER_BYTES: Final = 2 * 1024 * 1024
SHORT: Final = timedelta(days=1)  # for answers that do not say until when they are valid


class FetchError(PointcallError):
    """A server did not give what was asked for."""

    id = "attest.fetch"


@dataclass(frozen=True, slots=True)
class Answer:
    """Body and headers (names in lower case) of a successful answer."""

    body: bytes
    headers: Mapping[str, str]


Read = TypeVar("Read")
Get = Callable[[str], Answer]
Expiry = Callable[[Answer], datetime | None]


def http_get(url: str) -> Answer:
    """One GET over HTTP(S); FetchError for anything but a bounded answer with status 200."""
    if urlsplit(url).scheme not in ("http", "https"):
        raise FetchError("not a web address", got=url)
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as response:  # noqa: S310 (scheme checked above)
            body = response.read(MAX_ANSWER_BYTES + 1)
            headers = {name.lower(): value for name, value in response.headers.items()}
            status = response.status
    except urllib.error.HTTPError as error:
        error.close()
        hint = "wait, or use the cache of another node" if error.code == 429 else ""
        raise FetchError(f"the server answered {error.code}", want="200", got=url, hint=hint) from None
    except OSError as error:
        raise FetchError(f"the server cannot be reached: {error}", got=url) from None
    if status != 200 or len(body) > MAX_ANSWER_BYTES:
        raise FetchError("not an answer that we take", got=f"status {status}, {len(body)} bytes from {url}")
    return Answer(body, headers)


@dataclass(frozen=True, slots=True)
class Cache:
    """Answers on disk. `clock` gives aware UTC times and `sleep` waits seconds: values, so that tests need no time."""

    folder: Path
    clock: Callable[[], datetime]
    sleep: Callable[[float], None]
    get: Get = http_get
    spacing: timedelta = SPACING

    def fetch(self, url: str, expiry: Expiry) -> Answer:
        """The answer for a URL: from disk while it is valid, else from the server, one caller at a time."""
        name = hashlib.sha256(url.encode()).hexdigest()
        with self._locked(f"url-{name[:32]}"):
            found = self._stored(name)
            if found is not None:
                return found
            answer = self._ask(url)
            until = expiry(answer) or self.clock() + SHORT
            self._store(name, url, answer, until)
            return answer

    def _ask(self, url: str) -> Answer:
        """Ask the server, at least `spacing` after whoever asked it last, in any process."""
        host = hashlib.sha256(urlsplit(url).netloc.encode()).hexdigest()[:32]
        with self._locked(f"host-{host}"):
            mark = self.folder / f"host-{host}.asked"
            if mark.exists():
                since = self.clock() - datetime.fromisoformat(mark.read_text())
                if timedelta(0) <= since < self.spacing:
                    self.sleep((self.spacing - since).total_seconds())
            try:
                return self.get(url)
            finally:
                mark.write_text(self.clock().isoformat())

    def _stored(self, name: str) -> Answer | None:
        try:
            row = json.loads((self.folder / f"{name}.json").read_bytes())
            if self.clock() >= datetime.fromisoformat(row["until"]):
                return None
            return Answer(bytes.fromhex(row["body"]), dict(row["headers"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None  # absent or not whole: ask again

    def _store(self, name: str, url: str, answer: Answer, until: datetime) -> None:
        row = {"url": url, "until": until.isoformat(), "headers": dict(answer.headers), "body": answer.body.hex()}
        new = self.folder / f"{name}.{os.getpid()}.new"
        new.write_text(json.dumps(row))
        new.replace(self.folder / f"{name}.json")

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with (self.folder / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def amd(report: Report, cache: Cache, base: str = KDS, product: Line | None = None) -> CertificateFile:
    """VCEK, intermediates, root and CRL for a report. A VLEK cannot be had from AMD: only its chain and CRL are.

    `product` is needed for version 2. FetchError without it, or where the server gives something else.
    """
    line = report.line or product
    if line is None:
        raise FetchError("the report does not name its product", got=f"version {report.version}", hint="give --product")
    role = "vlek" if report.signing_key == snp.VLEK else "vcek"
    chain = cache.fetch(f"{base}/{role}/v1/{line}/cert_chain", _chain_expiry)
    revoked = cache.fetch(f"{base}/{role}/v1/{line}/crl", _crl_expiry)
    leaf = () if role == "vlek" else (cache.fetch(vcek_url(report, line, base), _leaf_expiry).body,)
    return CertificateFile((*leaf, *_pem(chain)), (revoked.body,))


def vcek_url(report: Report, line: Line, base: str = KDS) -> str:
    """Where AMD publishes the VCEK of this chip at this TCB (AMD 57230, 4.1)."""
    tcb, short = snp.tcb_of(line, report.reported_tcb), line in ("Turin", "Venice")
    parts = {"blSPL": tcb.bl, "teeSPL": tcb.tee, "snpSPL": tcb.snp, "ucodeSPL": tcb.ucode}
    if short:
        parts = {"fmcSPL": tcb.fmc, **parts}
    chip = report.chip_id[:8] if short else report.chip_id
    return f"{base}/vcek/v1/{line}/{chip.hex()}?" + "&".join(f"{key}={value:02d}" for key, value in parts.items())


def intel(quote: tdx.Quote, cache: Cache, base: str = PCS, root_crl: str = INTEL_ROOT_CRL) -> dict[str, str]:
    """The collateral for a quote, as `attest verify tdx --collateral` takes it; FetchError or MalformedError."""
    leaf, ca, _ = map(pck.parse, tdx.pck_certificates(quote.pck_pem))
    assert leaf.sgx is not None, "the chain's leaf is a PCK certificate"
    kind = "processor" if "Processor" in ca.name else "platform"
    tcb = cache.fetch(f"{base}/tdx/certification/v4/tcb?fmspc={leaf.sgx.fmspc.hex()}", _json_expiry("tcbInfo"))
    qe = cache.fetch(f"{base}/tdx/certification/v4/qe/identity", _json_expiry("enclaveIdentity"))
    revoked = cache.fetch(f"{base}/sgx/certification/v4/pckcrl?ca={kind}&encoding=der", _crl_expiry)
    tcb_info, tcb_signature = signed_text(tcb.body, "tcbInfo")
    identity, identity_signature = signed_text(qe.body, "enclaveIdentity")
    return {
        "tcb_info": tcb_info,
        "tcb_info_signature": tcb_signature,
        "tcb_info_issuer_chain": _header(tcb, "tcb-info-issuer-chain"),
        "qe_identity": identity,
        "qe_identity_signature": identity_signature,
        "qe_identity_issuer_chain": _header(qe, "sgx-enclave-identity-issuer-chain"),
        "pck_crl": revoked.body.hex(),
        "pck_crl_issuer_chain": _header(revoked, "sgx-pck-crl-issuer-chain"),
        "root_ca_crl": cache.fetch(root_crl, _crl_expiry).body.hex(),
    }


def signed_text(body: bytes, name: str) -> tuple[str, str]:
    """(the exact text that is signed, its signature in hex) out of `{"<name>":{...},"signature":"..."}`."""
    try:
        text = body.decode()
        start = text.index(f'"{name}":') + len(name) + 3
        _, end = json.JSONDecoder().raw_decode(text, start)
        signature = json.loads(text)["signature"]
        bytes.fromhex(signature)
    except (ValueError, KeyError, TypeError, RecursionError):
        raise FetchError("the server's answer has no signed text", want=f"{name} and signature") from None
    return text[start:end], signature


def _header(answer: Answer, name: str) -> str:
    if name not in answer.headers:
        raise FetchError("the server's answer lacks its issuer chain", want=f"header {name}")
    chain = unquote(answer.headers[name])
    pem.certificates(chain.encode())
    return chain


def _pem(answer: Answer) -> tuple[bytes, ...]:
    return tuple(pem.certificates(answer.body))


def _leaf_expiry(answer: Answer) -> datetime:
    """A VCEK never changes for one chip and TCB: valid as long as itself."""
    return _readable(lambda: certs.parse(answer.body).not_after)


def _chain_expiry(answer: Answer) -> datetime | None:
    _readable(lambda: [certs.parse(der) for der in _pem(answer)])
    return None


def _crl_expiry(answer: Answer) -> datetime:
    """Never past nextUpdate."""
    return _readable(lambda: crl.parse(answer.body).next_update)


def _json_expiry(name: str) -> Expiry:
    read: Callable[[bytes], TcbInfo | QeIdentity] = (
        collateral.parse_tcb_info if name == "tcbInfo" else collateral.parse_qe_identity
    )

    def expiry(answer: Answer) -> datetime:
        text, _ = signed_text(answer.body, name)
        return _readable(lambda: read(text.encode()).next_update)

    return expiry


def _readable(read: Callable[[], Read]) -> Read:
    """What an answer says about itself; an answer that cannot be read is never kept."""
    try:
        return read()
    except MalformedError as error:
        raise FetchError("the server gave something else", got=f"{error.id}: {error.got or error.message}") from None


def utc_now() -> datetime:
    return datetime.now(UTC)

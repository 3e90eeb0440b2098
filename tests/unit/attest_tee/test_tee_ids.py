"""Bytes that are no evidence, certificate or table are refused under the id of what they should have been."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from datetime import datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from pointcall_attest import cert_table, pck, pem, shown, tdreport
from pointcall_attest.appraise import malformed
from pointcall_attest.errors import MalformedError
from pointcall_executor.tee.fetch import MAX_ANSWER_BYTES, FetchError, http_get
from tests.unit.attest_tee.conftest import Machine
from tests.unit.attest_tee.test_tee_getters import td_report

BLOCK = b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"


def refused(call: Callable[[], Any]) -> str:
    with pytest.raises(MalformedError) as caught:
        call()
    return caught.value.id


@pytest.mark.parametrize("raw", [b"", b"{}", bytes(23), b"\xff" * 5000])
def test_what_is_no_evidence_of_any_form(raw: bytes) -> None:
    with pytest.raises(MalformedError) as caught:
        shown.described(raw)
    assert caught.value.id == "evidence.form.malformed"
    assert all(form in caught.value.got for form in ("SNP report", "TDX quote", "TDREPORT"))  # why it is none of them


@pytest.mark.parametrize(
    "raw",
    [
        BLOCK.replace(b"END CERTIFICATE", b"END KEY"),
        BLOCK * (pem.MAX_BLOCKS + 1),
        BLOCK[:-10],
        BLOCK.replace(b"AAAA", b"AAB="),
        BLOCK.replace(b"AAAA", b"AA"),
    ],
)
def test_what_is_no_pem(raw: bytes) -> None:
    assert refused(lambda: pem.blocks(raw)) == "pem.malformed"


def test_other_blocks_are_no_certificates() -> None:
    for raw in (b"", BLOCK.replace(b"CERTIFICATE", b"X509 CRL")):
        assert refused(lambda raw=raw: pem.certificates(raw)) == "pem.malformed"  # type: ignore[misc]


def test_what_is_no_certificate_table() -> None:
    guid = cert_table.ENTRIES["VCEK"]
    good = cert_table.encode({guid: b"leaf"})
    assert cert_table.parse(good) == {guid: b"leaf"}
    twice = good[:24] * 2 + bytes(24) + b"leaf"
    for raw in (b"", good[:24], twice, good[:-1], bytes(cert_table.MAX_TABLE_BYTES + 1)):
        assert refused(lambda raw=raw: cert_table.parse(raw)) == "snp.cert_table.malformed"  # type: ignore[misc]


@pytest.mark.parametrize("at", [4, 15, 192, 223, 400, 494, 495, 511, 960, 1023])
def test_a_reserved_byte_of_a_tdreport(at: int) -> None:
    raw = bytearray(td_report(bytes(64)))
    tdreport.parse(bytes(raw))
    raw[at] ^= 1
    assert refused(lambda: tdreport.parse(bytes(raw))) == "tdreport.reserved.malformed"


def test_what_is_no_certificate_of_intel(machine: Machine) -> None:
    for raw in (b"\x30" * 20_000, machine().ark):
        assert refused(lambda raw=raw: pck.parse(raw)) == "pck.malformed"  # type: ignore[misc]


def test_what_is_malformed_was_not_appraised() -> None:
    """The verdict names the one thing that was wrong, and that nothing else was looked at."""
    with pytest.raises(MalformedError) as caught:
        tdreport.parse(b"")
    verdict = malformed(caught.value, "tdx")
    assert not verdict.passed
    assert [(c.id, c.outcome) for c in verdict.checks] == [
        ("tdreport.length.malformed", "fail"),
        ("tee.appraisal", "not-checked"),
    ]


class Vendor(BaseHTTPRequestHandler):
    """Answers with the status in the path; `/long` is more than anybody takes."""

    def do_GET(self) -> None:
        name = self.path.strip("/")
        self.send_response(int(name) if name.isdecimal() else 200)
        self.end_headers()
        self.wfile.write(b"x" * (MAX_ANSWER_BYTES + 1) if name == "long" else b"answer")

    def log_message(self, *_: Any) -> None:
        """Quiet."""


@pytest.fixture
def vendor() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Vendor) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_what_is_fetched(vendor: str, now: datetime) -> None:
    assert http_get(f"{vendor}/200").body == b"answer"
    for url in (f"{vendor}/404", f"{vendor}/429", f"{vendor}/500", f"{vendor}/201", f"{vendor}/long"):
        with pytest.raises(FetchError) as refused:
            http_get(url)
        assert refused.value.id == "attest.fetch"
    for url in ("file:///etc/hostname", "ftp://127.0.0.1/", "http://127.0.0.1:1/"):
        with pytest.raises(FetchError) as refused:
            http_get(url)
        assert refused.value.id == "attest.fetch"

"""The pages of docs/spec say what the code does: layouts, policy keys, check ids, marks and roots."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import BaseModel

from pointcall_attest import certs, findings, pck, snp, tdreport, tdx
from pointcall_attest.layout import Layout
from pointcall_attest.tee_policy import SnpPolicy, TdxPolicy, TeePolicy
from pointcall_attest.trust import HARDWARE_ROOTS

SPEC = Path(__file__).resolve().parents[3] / "docs" / "spec"


@pytest.mark.parametrize(
    ("page", "layout"),
    [
        ("snp", snp.LAYOUT),
        ("tdx", tdx.HEADER),
        ("tdx", tdx.TD15_BODY),
        ("tdx", tdx.QE_REPORT),
        ("tdx", tdreport.LAYOUT),
    ],
)
def test_layouts_are_printed_row_by_row(page: str, layout: Layout) -> None:
    rows = [
        f"| {row.offset:#05x} | {row.size} | {f'`{row.name}`' if row.name else 'reserved, zero'} |"
        for row in layout.rows
    ]
    assert "\n".join(rows) in (SPEC / f"{page}.md").read_text()


@pytest.mark.parametrize(("model", "prefix"), [(TeePolicy, ""), (SnpPolicy, "snp."), (TdxPolicy, "tdx.")])
def test_every_policy_key_is_documented(model: type[BaseModel], prefix: str) -> None:
    text = (SPEC / "trust.md").read_text()
    keys = [name for name in model.model_fields if name not in ("snp", "tdx")]
    assert [name for name in keys if f"`{prefix}{name}`" not in text] == []


def test_roots_and_marks_are_documented() -> None:
    text = (SPEC / "trust.md").read_text()
    assert all(digest in text and name in text for digest, name in HARDWARE_ROOTS.items())
    for mark in (certs.EMULATED_MARK, certs.EMULATED_ORGANIZATION, pck.EMULATED_ORGANIZATION, pck.EMULATED_FMSPC.hex()):
        assert mark in text


def test_checks_of_verification_are_in_the_numbered_steps() -> None:
    for page in ("snp", "tdx"):
        text = (SPEC / f"{page}.md").read_text()
        ids = list(findings.CLAUSES)
        verification = [id_ for id_ in ids if id_.startswith(f"{page}.")]
        first = verification[: verification.index("snp.version" if page == "snp" else "tdx.tcb_status")]
        assert [id_ for id_ in first if f"`{id_}`" not in text and id_ != "snp.crl_required"] == []

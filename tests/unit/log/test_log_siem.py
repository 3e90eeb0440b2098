"""Copies for other systems: the forms, that a copy is checkable, and that sigstore-js accepts the bundle."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pointcall_attest.receipt import Receipt
from pointcall_attest.siem import check_copy, epoch_pem, ocsf, otel, place_of, sigstore_bundle
from tests.unit.log import world

VERIFY_JS = """
const fs = require('fs'), crypto = require('crypto');
const { bundleFromJSON } = require('@sigstore/bundle');
const { Verifier, toSignedEntity } = require('@sigstore/verify');
const publicKey = crypto.createPublicKey(fs.readFileSync(process.argv[3]));
const trust = { certificateAuthorities: [], timestampAuthorities: [], tlogs: [], ctlogs: [],
                publicKey: () => ({ publicKey, validFor: () => true }) };
const none = { tlogThreshold: 0, ctlogThreshold: 0, timestampThreshold: 0 };
new Verifier(trust, none).verify(toSignedEntity(bundleFromJSON(JSON.parse(fs.readFileSync(process.argv[2])))));
"""


@pytest.fixture(scope="module")
def entries(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    node = world.Node.boot(tmp_path_factory.mktemp("node"))
    for number in range(3):
        node.run(number)
    found = node.journal.entries()
    node.journal.close()
    return found


def test_ocsf_has_one_event_an_action(entries: list[Any]) -> None:
    rows = [row for e in entries for row in ocsf(e, world.ORIGIN)]
    assert len(rows) == 3
    assert {"activity_id", "category_uid", "class_uid", "type_uid", "time", "severity_id", "metadata"} <= rows[0].keys()
    assert (rows[0]["type_uid"], rows[0]["activity_name"], rows[0]["status_id"]) == (700103, "Restore", 1)
    assert rows[0]["command_uid"].endswith("/0")
    assert abs(rows[0]["time"] - world.NOW.timestamp() * 1000) < 2


def test_otel_has_one_record_an_entry(entries: list[Any]) -> None:
    rows = [otel(e, world.ORIGIN) for e in entries]
    assert [place_of(r) for r in rows] == [(world.ORIGIN, e.index, e.leaf_hash.hex()) for e in entries]
    assert json.loads(rows[0]["body"]["stringValue"])["node"] == "test"


@pytest.mark.parametrize("form", ["ocsf", "otel"])
def test_a_copy_is_checkable(form: str, entries: list[Any]) -> None:
    export = ocsf if form == "ocsf" else lambda e, o: [otel(e, o)]
    expected = [(e.index, e.leaf_hash.hex(), row) for e in entries for row in export(e, world.ORIGIN)]
    copy = [json.loads(json.dumps(row)) for _, _, row in expected]
    assert list(check_copy(copy, world.ORIGIN, expected)) == []
    assert list(check_copy(reversed(copy), world.ORIGIN, expected)) == []
    spoiled = json.loads(json.dumps(copy).replace("web", "wob"))
    for wrong in (
        copy[1:],
        [*copy, copy[0]],
        spoiled,
        [*copy, {}],
        [*copy, {"unmapped": {}}],
        [*copy, {"attributes": [1]}],
    ):
        assert list(check_copy(wrong, world.ORIGIN, expected)), len(wrong)
    assert list(check_copy(copy, "other.example/log", expected))


def test_sigstore_js_verifies_the_bundle(entries: list[Any], tmp_path: Path) -> None:
    modules = os.environ.get("NODE_PATH", "")
    node = shutil.which("node")
    if node is None or not (Path(modules) / "@sigstore" / "verify").is_dir():
        pytest.skip("node or @sigstore/verify in NODE_PATH is missing")
    (tmp_path / "v.js").write_text(VERIFY_JS)
    (tmp_path / "key.pem").write_bytes(epoch_pem(entries[0].body["public_key"]))
    receipt, good = entries[3].raw, tmp_path / "good.json"
    good.write_bytes(sigstore_bundle(receipt))
    bad = tmp_path / "bad.json"
    bad.write_bytes(sigstore_bundle(receipt.replace(b'"sig":"ME', b'"sig":"MF')))
    codes = [
        subprocess.run(
            [node, tmp_path / "v.js", file, tmp_path / "key.pem"], check=False, capture_output=True
        ).returncode
        for file in (good, bad)
    ]
    assert codes[0] == 0
    assert codes[1] != 0


def test_a_copy_holds_nothing_personal_unless_asked(entries: list[Any]) -> None:
    address = str(next(e for e in entries if e.kind == "receipt").receipt().inputs.values[2])
    assert address not in json.dumps([otel(e, world.ORIGIN) for e in entries])
    assert address in json.dumps([otel(e, world.ORIGIN, clear=True) for e in entries])


def test_ocsf_names_services_and_hides_addresses(tmp_path: Path) -> None:
    def of_an_address(receipt: Receipt) -> Receipt:
        action = receipt.actions[0].model_copy(update={"action": "open_circuit", "target": "192.0.2.7:5432"})
        return receipt.model_copy(update={"actions": (action,)})

    node = world.Node.boot(tmp_path)
    runs = [node.journal.receipt(run) for run in (node.run(0), node.run(1, of_an_address))]
    node.journal.close()
    closed, opened = ([row["message"] for e in runs for row in ocsf(e, world.ORIGIN, clear=c)] for c in (False, True))
    assert closed == [
        "web: CircuitOpened -> recreate service/web",
        "web: CircuitOpened -> open_circuit (sealed)",
    ]
    assert opened[1] == "web: CircuitOpened -> open_circuit 192.0.2.7:5432"


def test_a_copy_in_clear_of_an_erased_entry_is_named(entries: list[Any]) -> None:
    erased = [e.without_opening() for e in entries]
    for clear, named in ((True, True), (False, False)):
        copy = [otel(e, world.ORIGIN, clear=clear) for e in entries]
        now = [(e.index, e.leaf_hash.hex(), otel(e, world.ORIGIN, clear=clear)) for e in erased]
        assert bool(list(check_copy(copy, world.ORIGIN, now))) is named

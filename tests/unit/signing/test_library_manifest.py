"""Every runbook of the library goes the whole way: source, module, manifest, signature, admission."""

from __future__ import annotations

import datetime as dt
import shutil
from pathlib import Path

import pytest

from pointcall_attest.manifest import Manifest
from pointcall_keys.assemble import assemble
from pointcall_keys.recovery_manifest import RecoveryManifest
from pointcall_runbook import compile_source
from tests.unit.signing.test_assemble import document
from tests.unit.signing.world import NOW, World, declaration

RUNBOOKS = Path(__file__).resolve().parents[3] / "runbooks"
NAMES = sorted(path.parent.name for path in (RUNBOOKS / "library").glob("*/runbook.py"))


def test_the_whole_library(world: World, tmp_path: Path) -> None:
    shutil.copytree(RUNBOOKS / "library", tmp_path / "library")
    infos = {name: compile_source((RUNBOOKS / f"library/{name}/runbook.py").read_text(), name).info for name in NAMES}
    channels = sorted({channel for info in infos.values() for channel in info.channels})
    rows = [
        {
            "name": name,
            "source": f"library/{name}",
            "grants": {
                "actions": list(info.capabilities),
                "channels": list(info.channels),
                "services": list(info.services),
            },
        }
        for name, info in infos.items()
    ]
    services = sorted({service for info in infos.values() for service in info.services})
    for name in services:
        (tmp_path / f"{name}.json").write_bytes(declaration(name))
    spec = {
        "sensors": [],
        "services": [{"name": n, "declaration": f"{n}.json"} for n in services],
        "channels": [{"name": n, "kind": "log"} for n in channels],
    }
    source = RecoveryManifest.parse(document(runbooks=rows, **spec))
    day = dt.timedelta(days=1)
    built = assemble(source, tmp_path, tmp_path, sequence=7, not_before=NOW - day, expires=NOW + day)
    assert built == assemble(source, tmp_path, tmp_path, sequence=7, not_before=NOW - day, expires=NOW + day)
    candidate = world.check([world.sign(built.statement)], built.files)
    assert [c.id for c in candidate.verdict.failed] == []
    assert sorted(candidate.modules) == NAMES
    assert len(NAMES) >= 2


@pytest.mark.parametrize("name", NAMES)
def test_a_runbook_without_its_grants_is_not_admitted(world: World, name: str) -> None:
    rows = [{"name": name, "source": f"library/{name}", "grants": {}}]
    source = RecoveryManifest.parse(document(runbooks=rows, sensors=[], services=[]))
    day = dt.timedelta(days=1)
    built = assemble(source, RUNBOOKS, RUNBOOKS, sequence=7, not_before=NOW - day, expires=NOW + day)
    failed = {c.id for c in world.check([world.sign(built.statement)], built.files).verdict.failed}
    assert failed <= {"module.grants", "module.names"}
    assert "module.grants" in failed
    assert Manifest.parse(built.statement).runbook(name).events

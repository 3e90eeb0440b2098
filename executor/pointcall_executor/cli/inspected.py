"""What a BPF blob or a manifest says, as plain data and as text. Shown, not verified: `pointcall arm` does that."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pointcall_attest.manifest import Manifest, Runbook


def blob_described(raw: bytes) -> dict[str, Any]:
    """What a blob would put into the kernel. Raises BlobError."""
    from pointcall_executor.kernel.blob import Blob

    blob = Blob.parse(raw)
    return {
        "kind": "blob",
        "name": blob.name,
        "sha256": blob.sha256,
        "size": len(raw),
        "programs": [{"name": p.name, "attaches": p.section} for p in blob.programs],
        "maps": list(blob.maps),
        "constants": [
            {"name": c.name, "default": str(blob.defaults[c.name]), "hi": str(c.largest)} for c in blob.constants
        ],
    }


def blob_text(body: dict[str, Any]) -> str:
    """The form for people."""
    out = [f"blob {body['name']} {body['sha256']}", f"  {body['size']} bytes, maps: {', '.join(body['maps'])}"]
    out += [f"  program {p['name']} attaches to {p['attaches']}" for p in body["programs"]]
    out += [f"  constant {c['name']} = {c['default']}, 0..{c['hi']}" for c in body["constants"]]
    return "\n".join(out) + "\n"


def manifest_described(raw: bytes) -> dict[str, Any]:
    """What a manifest grants: the statement itself, or the payload of a Sigstore bundle. Raises MalformedError."""
    from pointcall_attest.manifest import Manifest
    from pointcall_attest.signature import unverified_payload

    payload = unverified_payload(raw)
    manifest = Manifest.parse(payload or raw)
    body = manifest.predicate.model_dump(mode="json")
    shown = ("name", "sequence", "previous", "not_before", "expires", "sensors", "services", "channels", "guard")
    return {
        "kind": "manifest",
        "sha256": manifest.sha256,
        "signed": payload is not None,
        "verified": False,
        **{key: body[key] for key in shown},
        "runbooks": [_runbook(manifest, r) for r in manifest.predicate.runbooks],
        "files": dict(manifest.subjects),
    }


def _runbook(manifest: Manifest, runbook: Runbook) -> dict[str, Any]:
    return runbook.model_dump(mode="json") | {"sha256": manifest.subjects[runbook.module]}


def manifest_text(body: dict[str, Any]) -> str:
    """The form for people."""
    signed = "signed, not verified here" if body["signed"] else "not signed"
    out = [f"manifest {body['name']} {body['sha256']}", f"  sequence {body['sequence']}, {signed}"]
    out.append(f"  valid from {body['not_before']} to {body['expires']}")
    for runbook in body["runbooks"]:
        grants = runbook["grants"]
        out.append(f"  runbook {runbook['name']} version {runbook['version']}, mode {runbook['mode']}")
        out.append(f"    on {', '.join(runbook['events'])}: module {runbook['sha256']}")
        out += [f"    may {', '.join(grants['actions']) or 'do nothing'}"]
        out += [
            f"    {kind}: {', '.join(grants[kind])}" for kind in ("services", "channels", "networks") if grants[kind]
        ]
        out += [f"    sets {name} = {value}" for name, value in sorted(runbook["parameters"].items())]
        needs = runbook["limits"]["approval"]
        out += [f"    needs a second person for: {', '.join(needs)}"] if needs else []
    out += [f"  sensor {s['name']}: {body['files'][s['blob']]}" for s in body["sensors"]]
    out += [f"  service {s['name']}: {s['kind']}, declared state {s['digest']}" for s in body["services"]]
    out += [f"  channel {c['name']}: {c['kind']} {c['address']}".rstrip() for c in body["channels"]]
    return "\n".join(out) + "\n"

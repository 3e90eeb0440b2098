"""Verifies bundles in a child process that lives for one verification. The child can compute, and nothing else.

Before it reads its input the child gives up memory, CPU time, file size, further processes and, by an audit hook,
sockets and files opened for writing. The hook is a second fence for our own imports, not a sandbox against native code;
the limits are the kernel's. What comes back is parsed as strictly as any outside input.
"""

from __future__ import annotations

import base64
import datetime as dt
import json
import resource
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, Final

from pointcall_attest.errors import AttestError, MalformedError, VerifyError
from pointcall_attest.policy import TrustPolicy
from pointcall_attest.signature import MAX_BUNDLE_BYTES, MAX_BUNDLES, SignedStatement, SignerIdentity
from pointcall_attest.trusted_root import MAX_ROOT_BYTES

MEMORY_BYTES: Final = 768 * 1024 * 1024  # address space; the library and its imports need a fifth of it
CPU_SECONDS: Final = 20  # a verification takes 0.5 s, import included
WALL_SECONDS: Final = 60.0
MAX_REQUEST_BYTES: Final = 16 * 1024 * 1024
MAX_REPLY_BYTES: Final = 1024 * 1024
_PROGRAM: Final = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from pointcall_attest.signature_child import main; main()"
)
_WRITING: Final = frozenset("wax+")


def verify_in_child(
    bundles: Sequence[bytes], trusted_root: bytes, policy: TrustPolicy, at: dt.datetime, predicate_type: str
) -> SignedStatement:
    """As `verify_bundles`. VerifyError `manifest.child` if the child ended without an answer."""
    _check_sizes(bundles, trusted_root)
    request = {
        "bundles": [base64.b64encode(b).decode() for b in bundles],
        "trusted_root": base64.b64encode(trusted_root).decode(),
        "policy": base64.b64encode(policy.raw).decode(),
        "at": at.isoformat(),
        "predicate_type": predicate_type,
    }
    return _answer(_run(json.dumps(request).encode()))


def _check_sizes(bundles: Sequence[bytes], trusted_root: bytes) -> None:
    """What is too large is refused before it is copied anywhere."""
    if len(bundles) > MAX_BUNDLES or any(len(b) > MAX_BUNDLE_BYTES for b in bundles):
        raise MalformedError(
            "the bundles are too large", id="manifest.bundle", want=f"<= {MAX_BUNDLES} of {MAX_BUNDLE_BYTES} bytes"
        )
    if len(trusted_root) > MAX_ROOT_BYTES:
        raise MalformedError("the trusted root is too large", id="trust.root", want=f"<= {MAX_ROOT_BYTES} bytes")


def _run(request: bytes) -> bytes:
    here = [path for path in sys.path if path.startswith("/")]  # a relative one would mean another folder there
    command = [sys.executable, "-I", "-B", "-c", _PROGRAM, json.dumps(here)]
    try:
        done = subprocess.run(
            command,
            input=request,
            capture_output=True,
            timeout=WALL_SECONDS,
            check=False,
            env={},
            close_fds=True,
            cwd="/",
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _silent(type(error).__name__) from None
    if done.returncode != 0 or len(done.stdout) > MAX_REPLY_BYTES:
        last = done.stderr.decode(errors="replace").strip().rsplit("\n", 1)[-1]
        raise _silent(f"exit {done.returncode}: {last[:160]}")
    return done.stdout


def _silent(got: str) -> VerifyError:
    return VerifyError(
        "the verifying child gave no answer",
        id="manifest.child",
        want="an answer within its limits",
        got=got,
        hint="an input that exhausts memory or time is refused; try `pointcall sign` again, or look at the bundle",
    )


def _answer(reply: bytes) -> SignedStatement:
    try:
        body = json.loads(reply)
        if "error" in body:
            raise _refusal(body["error"])
        signed_at = body["signed_at"]
        return SignedStatement(
            base64.b64decode(body["payload"], validate=True),
            tuple(SignerIdentity(str(issuer), str(identity)) for issuer, identity in body["signers"]),
            None if signed_at is None else dt.datetime.fromisoformat(signed_at),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise _silent(f"{type(error).__name__} in its answer") from None


def _refusal(error: dict[str, Any]) -> AttestError:
    kind = MalformedError if error["malformed"] is True else VerifyError
    texts = {part: str(error[part]) for part in ("id", "want", "got", "hint")}
    return kind(str(error["message"]), **texts)


# In the child


def main() -> None:
    """Reads one request from standard input and writes one answer to standard output."""
    from pointcall_attest.signature import verify_bundles

    _import_everything()
    _give_up()
    request = json.loads(sys.stdin.buffer.read(MAX_REQUEST_BYTES))
    try:
        signed = verify_bundles(
            [base64.b64decode(b) for b in request["bundles"]],
            trusted_root=base64.b64decode(request["trusted_root"]),
            policy=TrustPolicy.parse(base64.b64decode(request["policy"])),
            at=dt.datetime.fromisoformat(request["at"]),
            in_process=True,
            predicate_type=request["predicate_type"],
        )
        answer: dict[str, Any] = {
            "payload": base64.b64encode(signed.payload).decode(),
            "signers": [[s.issuer, s.identity] for s in signed.signers],
            "signed_at": signed.signed_at and signed.signed_at.isoformat(),
        }
    except AttestError as refusal:
        parts = {"message": refusal.message, "id": refusal.id, "want": refusal.want, "got": refusal.got}
        kind = isinstance(refusal, MalformedError)
        answer = {"error": parts | {"hint": refusal.hint, "malformed": kind}}
    sys.stdout.write(json.dumps(answer))


def _import_everything() -> None:
    """Imports read files and may compile: they are done before the fences go up."""
    import rfc3161_client  # noqa: F401
    import sigstore.verify  # noqa: F401


def _give_up() -> None:
    limits = (
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_CPU, CPU_SECONDS),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_NOFILE, 16),
    )
    for which, value in limits:
        resource.setrlimit(which, (value, value))
    sys.addaudithook(_refuse)


def _refuse(event: str, args: tuple[Any, ...]) -> None:
    writes = event == "open" and isinstance(args[1], str) and not _WRITING.isdisjoint(args[1])
    if writes or event.startswith(
        ("socket.", "subprocess.", "os.exec", "os.fork", "os.posix_spawn", "os.system", "ctypes.")
    ):
        raise PermissionError(f"{event} has no place in a verification")

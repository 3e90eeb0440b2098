"""Verifies bundles in a child process that lives for one request. The child can compute, and nothing else.

Before it reads its input the child gives up memory, CPU time, file size, further processes and, by an audit hook,
sockets and files opened for writing. The hook is a second fence for our own imports, not a sandbox against native code;
the limits are the kernel's. What comes back is parsed as strictly as any outside input.

A child can be started before there is a request: `begin`. It imports meanwhile, gives up the same, and waits for its
input. What its starter may not do any more it may not either, so `begin` comes after privileges are given up.
"""

from __future__ import annotations

import base64
import contextlib
import datetime as dt
import gc
import json
import os
import resource
import subprocess
import sys
from collections import deque
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
MAX_REPLY_BYTES: Final = 8 * 1024 * 1024  # 32 notices as long as a bundle can carry
_PROGRAM: Final = (
    "import gc, json, sys; gc.disable(); sys.path[:] = json.loads(sys.argv[1]); "
    "from pointcall_attest.signature_child import main; main()"
)
_WRITING: Final = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_READING: Final = frozenset({"os.listdir", "os.scandir", "os.getxattr", "os.listxattr"})  # what late imports do

_waiting: Final[deque[subprocess.Popen[bytes]]] = deque()  # children that were started before there is a request


def verify_in_child(
    groups: Sequence[tuple[Sequence[bytes], str]], trusted_root: bytes, policy: TrustPolicy, at: dt.datetime
) -> tuple[SignedStatement | AttestError, ...]:
    """As `verify_each`. VerifyError `manifest.child`, for every statement, if the child ended without an answer."""
    refused = [_too_large(bundles, trusted_root) for bundles, _ in groups]
    asked = [group for group, refusal in zip(groups, refused, strict=True) if refusal is None]
    request = {
        "groups": [{"bundles": [_text(b) for b in bundles], "type": kind} for bundles, kind in asked],
        "trusted_root": _text(trusted_root),
        "policy": _text(policy.raw),
        "at": at.isoformat(),
    }
    answers = iter(_asked(json.dumps(request).encode(), len(asked)) if asked else ())
    return tuple(refusal or next(answers) for refusal in refused)


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _too_large(bundles: Sequence[bytes], trusted_root: bytes) -> MalformedError | None:
    """What is too large is refused before it is copied anywhere."""
    if len(bundles) > MAX_BUNDLES or any(len(b) > MAX_BUNDLE_BYTES for b in bundles):
        return MalformedError(
            "the bundles are too large", id="manifest.bundle", want=f"<= {MAX_BUNDLES} of {MAX_BUNDLE_BYTES} bytes"
        )
    if len(trusted_root) > MAX_ROOT_BYTES:
        return MalformedError("the trusted root is too large", id="trust.root", want=f"<= {MAX_ROOT_BYTES} bytes")
    return None


def _asked(request: bytes, count: int) -> list[SignedStatement | AttestError]:
    try:
        if len(request) > MAX_REQUEST_BYTES:
            raise _silent(f"a request of {len(request)} bytes")
        rows = json.loads(_run(request))
        if not isinstance(rows, list) or len(rows) != count:
            raise _silent("another number of answers")
        return [_answer(row) for row in rows]
    except (VerifyError, ValueError) as error:
        silent = error if isinstance(error, VerifyError) else _silent(f"{type(error).__name__} in its answer")
        return [silent] * count


def begin(count: int = 1) -> None:
    """Start children for the next `count` requests, confined as this process is now. `discard` ends what nobody asked.

    A child that cannot be started is not missed: the request starts one.
    """
    with contextlib.suppress(OSError):
        _waiting.extend(_started() for _ in range(count))


def discard() -> None:
    """End the children that wait for a request. May be called at any time, also where none waits."""
    while (child := _taken()) is not None:
        _end(child)


def _run(request: bytes) -> bytes:
    try:
        child = _taken() or _started()
    except OSError as error:
        raise _silent(type(error).__name__) from None
    try:
        reply, errors = child.communicate(request, timeout=WALL_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _silent(type(error).__name__) from None
    finally:
        _end(child)
    if child.returncode != 0 or len(reply) > MAX_REPLY_BYTES:
        last = errors.decode(errors="replace").strip().rsplit("\n", 1)[-1]
        raise _silent(f"exit {child.returncode}: {last[:160]}")
    return reply


def _started() -> subprocess.Popen[bytes]:
    here = [path for path in sys.path if path.startswith("/")]  # a relative one would mean another folder there
    command = [sys.executable, "-I", "-B", "-c", _PROGRAM, json.dumps(here)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, env={}, close_fds=True, cwd="/")


def _taken() -> subprocess.Popen[bytes] | None:
    """A child that waits, if there is one; nobody else gets it. One that ended meanwhile is left aside."""
    with contextlib.suppress(IndexError):
        while True:
            child = _waiting.popleft()
            if child.poll() is None:
                return child
            _end(child)
    return None


def _end(child: subprocess.Popen[bytes]) -> None:
    """Whatever it does. Twice without harm."""
    child.kill()
    for pipe in (child.stdin, child.stdout, child.stderr):
        if pipe is not None:
            with contextlib.suppress(OSError):  # what was not written yet to one that is gone
                pipe.close()
    child.wait()


def _silent(got: str) -> VerifyError:
    return VerifyError(
        "the verifying child gave no answer",
        id="manifest.child",
        want="an answer within its limits",
        got=got,
        hint="an input that exhausts memory or time is refused; try `pointcall sign` again, or look at the bundle",
    )


def _answer(body: Any) -> SignedStatement | AttestError:
    try:
        if "error" in body:
            return _refusal(body["error"])
        signed_at = body["signed_at"]
        return SignedStatement(
            base64.b64decode(body["payload"], validate=True),
            tuple(SignerIdentity(str(issuer), str(identity)) for issuer, identity in body["signers"]),
            None if signed_at is None else dt.datetime.fromisoformat(signed_at),
        )
    except (ValueError, KeyError, TypeError) as error:
        return _silent(f"{type(error).__name__} in its answer")


def _refusal(error: dict[str, Any]) -> AttestError:
    kind = MalformedError if error["malformed"] is True else VerifyError
    texts = {part: str(error[part]) for part in ("id", "want", "got", "hint")}
    return kind(str(error["message"]), **texts)


# In the child


def main() -> None:
    """Reads one request from standard input and writes one answer to standard output."""
    from pointcall_attest.signature import verify_each

    _import_everything()
    _give_up()
    request = json.loads(sys.stdin.buffer.read(MAX_REQUEST_BYTES))
    answers = verify_each(
        [([base64.b64decode(b) for b in group["bundles"]], group["type"]) for group in request["groups"]],
        trusted_root=base64.b64decode(request["trusted_root"]),
        policy=TrustPolicy.parse(base64.b64decode(request["policy"])),
        at=dt.datetime.fromisoformat(request["at"]),
        in_process=True,
    )
    sys.stdout.write(json.dumps([_row(answer) for answer in answers]))


def _row(answer: SignedStatement | AttestError) -> dict[str, Any]:
    if isinstance(answer, AttestError):
        parts = {"message": answer.message, "id": answer.id, "want": answer.want, "got": answer.got}
        return {"error": parts | {"hint": answer.hint, "malformed": isinstance(answer, MalformedError)}}
    return {
        "payload": _text(answer.payload),
        "signers": [[s.issuer, s.identity] for s in answer.signers],
        "signed_at": answer.signed_at and answer.signed_at.isoformat(),
    }


def _import_everything() -> None:
    """Imports read files and may compile: they are done before the fences go up. They leave no garbage to look for."""
    import rfc3161_client  # noqa: F401
    import sigstore.verify  # noqa: F401

    gc.enable()


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
    writes = event == "open" and isinstance(args[2], int) and args[2] & _WRITING
    acts = event.startswith(("socket.", "subprocess.", "os.", "ctypes.", "pty.", "shutil.", "fcntl.", "signal."))
    if writes or (acts and event not in _READING):
        raise PermissionError(f"{event} has no place in a verification")

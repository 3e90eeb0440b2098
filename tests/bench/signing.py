"""Signing beside the plain library, in one run: `python -m tests.bench.signing` prints one JSON line a figure.

verify_manifest_cpu_ms_p50  `verify_bundles` in process, warm, CPU time; ratio to `verify_dsse` of the library alone
verify_manifest_ms_p50      the same, wall time
verify_manifest_ms_p99      the same, 99th percentile
check_manifest_cpu_ms_p50   all of admission but the evidence: signature, files, modules; CPU time
check_manifest_ms_p50       the same, wall time
verify_key_ms_p50           a bundle by a long-lived key
verify_child_ms_p50         `verify_bundles` in its child process, import of the library included
sign_ms_p50                 one keyless signature against the private instance on loopback
version_ms_p50              `pointcall --version`, a whole process; ratio to an interpreter that does nothing
"""

from __future__ import annotations

import datetime as dt
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pointcall_attest.signature import verify_bundles
from pointcall_keys.long_lived import FileKey, policy_row, sign_with_key
from pointcall_keys.private_sigstore import PrivateSigstore
from tests.bench.figures import figure, percentile
from tests.unit.signing.world import ALICE, NOW, World, statement

ROUNDS = 300


def times_ms(call: Callable[[], object], rounds: int = ROUNDS) -> list[float]:
    for _ in range(min(5, rounds)):
        call()
    out = []
    for _ in range(rounds):
        start = time.perf_counter_ns()
        call()
        out.append((time.perf_counter_ns() - start) / 1e6)
    return sorted(out)


def cpu_ms(call: Callable[[], object]) -> list[float]:
    out = []
    for _ in range(ROUNDS):
        start = time.thread_time_ns()
        call()
        out.append((time.thread_time_ns() - start) / 1e6)
    return out


def beside(library: Callable[[], object], ours: Callable[[], object]) -> None:
    """CPU time of both, in turns: a busy machine slows both alike and moves no waiting into either."""
    spent: tuple[list[float], list[float]] = ([], [])
    for _ in range(ROUNDS):
        for call, out in zip((library, ours), spent, strict=True):
            start = time.thread_time_ns()
            call()
            out.append((time.thread_time_ns() - start) / 1e6)
    bare, own = (statistics.median(out) for out in spent)
    alone = f"verify_dsse of the library alone, {bare:.3f} ms"
    figure("signing", "verify_manifest_cpu_ms_p50", own, "ms", ROUNDS, baseline=alone, ratio=own / bare)


def library(world: World, bundle: bytes) -> Callable[[], Any]:
    """One verification by the library alone, with its verifier and bundle ready."""
    from sigstore.models import Bundle, ClientTrustConfig
    from sigstore.verify import Verifier, policy

    root = ClientTrustConfig.from_json(json.dumps(world.sigstore.trust_config())).trusted_root
    verifier, opened = Verifier(trusted_root=root), Bundle.from_json(bundle)
    named = policy.Identity(identity=ALICE, issuer=world.sigstore.issuer)
    return lambda: verifier.verify_dsse(opened, named)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        with PrivateSigstore.start(directory / "sigstore", clock=lambda: dt.datetime.now(dt.UTC)) as sigstore:
            measure(World(sigstore), directory)


def measure(world: World, directory: Path) -> None:
    payload = statement()
    bundle, root, policy = world.sign(payload), world.sigstore.trusted_root(), world.policy()
    beside(
        library(world, bundle),
        lambda: verify_bundles([bundle], trusted_root=root, policy=policy, at=NOW, in_process=True),
    )
    ours = times_ms(lambda: verify_bundles([bundle], trusted_root=root, policy=policy, at=NOW, in_process=True))
    figure("signing", "verify_manifest_ms_p50", statistics.median(ours), "ms", ROUNDS)
    figure("signing", "verify_manifest_ms_p99", percentile(ours, 0.99), "ms", ROUNDS)
    spent = cpu_ms(lambda: world.check([bundle]))
    figure("signing", "check_manifest_cpu_ms_p50", statistics.median(spent), "ms", ROUNDS)
    checked = times_ms(lambda: world.check([bundle]))
    figure("signing", "check_manifest_ms_p50", statistics.median(checked), "ms", ROUNDS)
    key = FileKey.make(directory / "key.pem", None)
    trust = world.policy(keys=[policy_row("key", key)])
    signed = sign_with_key(payload, key)
    by_key = times_ms(lambda: verify_bundles([signed], trusted_root=root, policy=trust, at=NOW, in_process=True))
    figure("signing", "verify_key_ms_p50", statistics.median(by_key), "ms", ROUNDS)
    child = times_ms(lambda: verify_bundles([bundle], trusted_root=root, policy=policy, at=NOW), rounds=5)
    figure("signing", "verify_child_ms_p50", statistics.median(child), "ms", 5)
    signing = times_ms(lambda: world.sign(payload), rounds=30)
    figure("signing", "sign_ms_p50", statistics.median(signing), "ms", 30)
    version()


def version() -> None:
    """The cheapest verb, from a shell's point of view."""
    script = [sys.executable, "-c", "from pointcall_executor.cli import main; main(['--version'])"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}

    def run(words: list[str]) -> float:
        call = functools.partial(subprocess.run, words, env=environment, capture_output=True, check=True)
        return statistics.median(times_ms(call, rounds=15))

    bare, own = run([sys.executable, "-c", "pass"]), run(script)
    figure(
        "signing", "version_ms_p50", own, "ms", 15, baseline=f"an interpreter alone, {bare:.1f} ms", ratio=own / bare
    )


if __name__ == "__main__":
    main()

"""Pointers and revocations on a running executor: what is armed stops being armed, nothing else ever starts to be."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest

from pointcall_attest.errors import RefusedError
from pointcall_attest.manifest import Manifest
from pointcall_attest.notice import PointerBody, RevocationBody, notice_statement
from pointcall_executor.notices import FOLDER, keep_notices
from pointcall_executor.recorded import RecordedNode
from pointcall_keys.assemble import Assembled
from pointcall_keys.signer import sign_statement
from tests.lab import IDENTITY, Lab, now
from tests.scenario.test_loop_story import Watched, eventually, spec


class Noticed:
    """A running executor, and hands that sign notices and put them where they belong."""

    def __init__(self, watched: Watched) -> None:
        self.watched, self.lab, self.executor = watched, watched.lab, watched.executor

    def arm(self, built: Assembled) -> None:
        self.executor.arm(self.lab.sign(built))

    def send(self, body: PointerBody | RevocationBody, who: str = IDENTITY) -> None:
        token = self.lab.sigstore.token(who)
        bundle = sign_statement(notice_statement(body), trust_config=self.lab.sigstore.trust_config(), token=token)
        keep_notices(self.lab.state / FOLDER, [bundle])

    def point(self, built: Assembled, **over: Any) -> None:
        manifest = Manifest.parse(built.statement)
        fields: dict[str, Any] = {"name": manifest.name, "ring": "all", "sequence": manifest.sequence}
        ends = {"issued": now(), "expires": now() + timedelta(hours=1)}
        self.send(PointerBody(**(fields | {"manifest": manifest.sha256} | ends | over)))

    def revoke(self, *digests: str, who: str = IDENTITY) -> None:
        self.send(RevocationBody(name="x", issued=now(), reason="bad", revoked=digests), who)

    def refused(self, act: Callable[[], object]) -> list[str]:
        with pytest.raises(RefusedError) as caught:
            act()
        return [c.id for c in caught.value.verdict.failed]

    def reload(self) -> None:
        self.executor.reload(self.executor.config)

    @property
    def armed(self) -> int:
        return self.executor.admitted.manifest.sequence if self.executor.admitted else 0


@pytest.fixture
def noticed(lab: Lab) -> Iterator[Noticed]:
    node = RecordedNode()
    with lab.executor(node) as executor:
        yield Noticed(Watched(lab, executor, node))


def built(noticed: Noticed, sequence: int = 1) -> Assembled:
    return noticed.lab.assemble(spec(noticed.lab), sequence)


def test_a_revocation_disarms_what_is_armed(noticed: Noticed) -> None:
    one = built(noticed)
    noticed.arm(one)
    noticed.revoke("00" * 32)
    noticed.reload()
    assert noticed.armed == 1
    noticed.revoke(Manifest.parse(one.statement).subjects["modules/fix.wasm"])
    assert noticed.refused(noticed.reload) == ["manifest.revoked"]
    assert noticed.armed == 0
    assert noticed.watched.refusals() == ["manifest.revoked"]
    assert noticed.refused(lambda: noticed.arm(one)) == ["manifest.revoked"]
    noticed.reload()
    assert noticed.armed == 0


def test_who_arms_something_else_in_vain_does_not_hide_a_revocation(noticed: Noticed) -> None:
    one = built(noticed, 3)
    noticed.arm(one)
    noticed.revoke(Manifest.parse(one.statement).sha256)
    assert noticed.refused(lambda: noticed.arm(built(noticed, 1))) == ["manifest.sequence"]
    assert noticed.armed == 3
    assert noticed.refused(noticed.reload) == ["manifest.revoked"]
    assert noticed.armed == 0


def test_trust_that_changes_while_the_platform_is_silent_is_judged_by_soon(
    noticed: Noticed, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = built(noticed)
    noticed.arm(one)
    noticed.revoke(Manifest.parse(one.statement).sha256)

    def scarce(*_: object) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(noticed.executor._sessions, "admit", scarce)
    with pytest.raises(OSError, match="Too many"):
        noticed.reload()
    assert noticed.watched.refusals() == ["tee.renewal"]
    assert noticed.armed == 1
    assert noticed.executor._epoch.due_ns < time.monotonic_ns() + 31_000_000_000  # not an epoch later
    monkeypatch.undo()
    noticed.executor._epoch.due_ns = 1
    eventually(lambda: noticed.armed == 0)


def test_a_revocation_is_found_when_an_epoch_is_renewed(noticed: Noticed) -> None:
    one = built(noticed)
    noticed.arm(one)
    noticed.revoke(Manifest.parse(one.statement).sha256)
    assert noticed.armed == 1
    assert noticed.refused(noticed.executor.roll_epoch) == ["manifest.revoked"]
    eventually(lambda: noticed.armed == 0)


def test_a_revocation_holds_after_a_restart(noticed: Noticed, lab: Lab) -> None:
    one = built(noticed)
    noticed.arm(one)
    noticed.revoke(Manifest.parse(one.statement).sha256)
    noticed.executor.close()
    node = RecordedNode()
    with lab.executor(node) as executor:
        again = Noticed(Watched(lab, executor, node))
        assert again.refused(lambda: again.arm(one)) == ["manifest.revoked"]


def test_a_notice_by_somebody_else_stops_and_does_not_act(noticed: Noticed) -> None:
    one = built(noticed)
    noticed.arm(one)
    noticed.revoke("00" * 32, who="https://git.example/else")
    assert noticed.refused(noticed.reload) == ["manifest.notices"]
    assert noticed.armed == 0
    for path in (noticed.lab.state / FOLDER).iterdir():
        path.unlink()
    noticed.arm(one)
    assert noticed.armed == 1


def test_a_pointer_rolls_forward_and_never_back(noticed: Noticed) -> None:
    noticed.lab.set_policy(require_pointer=True)
    noticed.reload()
    one = built(noticed)
    assert noticed.refused(lambda: noticed.arm(one)) == ["manifest.newest"]
    noticed.point(one)
    noticed.arm(one)
    assert noticed.armed == 1
    two = built(noticed, 3)
    assert noticed.refused(lambda: noticed.arm(two)) == ["manifest.newest"]
    assert noticed.armed == 1
    noticed.point(two)
    noticed.arm(two)
    assert noticed.armed == 3
    assert noticed.refused(lambda: noticed.arm(one)) == ["manifest.sequence", "manifest.newest"]


def test_freshness_ends(noticed: Noticed) -> None:
    """A host that withholds pointers has an executor that stops."""
    noticed.lab.set_policy(require_pointer=True)
    noticed.reload()
    one = built(noticed)
    end = now() + timedelta(seconds=8)
    noticed.point(one, expires=end)
    noticed.arm(one)
    noticed.executor.roll_epoch()
    assert noticed.armed == 1
    eventually(lambda: now() > end)
    assert noticed.refused(noticed.executor.roll_epoch) == ["manifest.newest"]
    assert noticed.armed == 0

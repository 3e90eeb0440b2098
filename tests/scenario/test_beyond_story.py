"""What was admitted and yet is beyond this executor, and what asks for a manifest where none is armed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import pytest

from pointcall_executor import arming
from pointcall_executor.arming import ArmingError
from pointcall_executor.daemon import StoppedError
from pointcall_executor.recorded import RecordedNode
from tests.lab import Lab
from tests.scenario.test_loop_story import HERE, Watched, spec
from tests.unit.services.test_declaration import KINDS


@pytest.fixture
def watched(make_lab: Callable[..., Lab]) -> Iterator[Watched]:
    lab, node = make_lab(), RecordedNode()
    with lab.executor(node) as executor:
        yield Watched(lab, executor, node)


def test_an_action_that_this_executor_has_not(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """A manifest for a newer executor: nothing is armed, and the log says what was missing."""
    older = {name: verb for name, verb in arming.REGISTRY.items() if name != "recreate"}
    monkeypatch.setattr(arming, "REGISTRY", older)
    with pytest.raises(ArmingError) as refused:
        watched.arm()
    assert (refused.value.id, refused.value.got) == ("arm.action", "recreate")
    assert watched.refusals() == ["arm.action"]
    assert watched.executor.admitted is None


def test_a_service_that_cannot_do_what_is_granted(watched: Watched) -> None:
    """What a cluster keeps has no process here that could be signalled."""
    body = spec(watched.lab)
    pods = KINDS["kubernetes"]
    declaration = {"format": "pointcall-service/v1", "name": "pods", "kind": "kubernetes", "kubernetes": pods}
    (watched.lab.sources / "pods.json").write_text(json.dumps(declaration))
    body["services"].append({"name": "pods", "kind": "kubernetes", "declaration": "pods.json"})
    body["runbooks"][0]["grants"] = {
        "actions": ["recreate", "notify", "kill"],
        "services": ["api", "pods"],
        "channels": ["ops"],
    }
    with pytest.raises(ArmingError) as refused:
        watched.arm(body)
    assert (refused.value.id, refused.value.got) == ("arm.service", "pods, kubernetes")
    assert watched.refusals() == ["arm.service"]


def test_nothing_by_hand_where_nothing_is_armed(watched: Watched) -> None:
    executor = watched.executor
    for call in (
        lambda: executor.trip(HERE.address, HERE.port, 1_000_000_000, "by hand"),
        lambda: executor.release(HERE.address, HERE.port, "by hand"),
        lambda: executor.approve(b"{}"),
    ):
        with pytest.raises(StoppedError) as refused:
            call()
        assert refused.value.id == "executor.disarmed"
    assert executor.journal.entries(kind="intent") == []

"""Which services of a manifest are taken over, started, or left alone, for kinds that only remember what they did."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from pointcall_attest.declaration import ServiceDeclaration
from pointcall_executor.services.declared import DeclaredServices
from pointcall_executor.services.managed import ABILITIES, NEEDS, NOTHING_LEFT, ServiceError, Started
from pointcall_runbook.vocabulary import ACTIONS, service
from tests.unit.services.test_declaration import KINDS
from tests.unit.services.world import declared

WEB, SITE = service("web").number, service("site").number


class Remembered:
    """A service that does nothing."""

    def __init__(self, declaration: ServiceDeclaration, does: list[str], refuses: str, runs: bool) -> None:
        self.declaration, self.name = declaration, declaration.name
        self.abilities = ABILITIES[declaration.kind]
        self.ours = declaration.kind != "kubernetes"
        self._does, self._refuses = does, refuses
        self.running = runs
        self.pid = self.cgroup_id = 7 if runs else 0

    @property
    def held(self) -> bool:
        return self.running

    def found_in(self) -> int:
        return self.cgroup_id

    def alive(self) -> int:
        return self.pid if self.running else 0

    def adopt(self) -> str:
        self._does.append("adopt")
        return self._refuses

    def start(self, on_cgroup: Any) -> Started:
        self._does.append("start")
        self.running, self.pid, self.cgroup_id = True, 7, 7
        on_cgroup(7)
        return Started(7, 7, 0, 0, 0, 0, "")

    def destroy(self, grace_ns: int) -> int:
        self._does.append(f"destroy {grace_ns}")
        self.running = False
        return 0

    def release(self) -> None:
        self._does.append("release")

    def healthy(self) -> str:
        return "" if self.running else "no"


class Stage:
    """Manifests one after the other; `does` is what was done to services, `moves` what was told."""

    def __init__(self, refuses: str = "", runs: bool = True) -> None:
        self.does: list[str] = []
        self.moves: list[tuple[int, int]] = []
        self.refuses, self.runs = refuses, runs

    def services(self, kind: str, before: DeclaredServices | None = None, **over: Any) -> DeclaredServices:
        return self.of([declared(kind, "web", KINDS[kind] | over)], before)

    def of(
        self,
        declarations: Sequence[ServiceDeclaration],
        before: DeclaredServices | None = None,
        earlier: Sequence[ServiceDeclaration] = (),
    ) -> DeclaredServices:
        kinds: Any = SimpleNamespace(
            make=lambda d: Remembered(d, self.does, self.refuses, self.runs),
            folder=SimpleNamespace(is_dir=lambda: False),
            follow=lambda _services: None,
        )
        moved = lambda *moved: self.moves.append(moved)  # noqa: E731 - one callback
        if earlier:
            before = DeclaredServices.left({d.name: d for d in earlier}, kinds)
        return DeclaredServices({d.name: d for d in declarations}, kinds, before, moved)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_proven_is_taken_over(kind: str) -> None:
    stage = Stage()
    services = stage.services(kind)
    assert services.adopt() == []
    assert stage.moves == ([] if kind == "kubernetes" else [(WEB, 7)])
    assert stage.does == ["adopt"]
    assert services.refused == {"web": ""}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("runs", [False, True])
def test_what_is_not_proven_is_started_also_if_it_runs(kind: str, runs: bool) -> None:
    stage = Stage("it is another", runs)
    services = stage.services(kind)
    assert services.adopt() == ([] if kind == "kubernetes" else [WEB])  # a cluster starts its own
    assert stage.moves == []
    assert services.refused == {"web": "it is another"}


def test_what_ends_while_it_is_taken_over_is_started() -> None:
    assert Stage("", runs=False).services("process").adopt() == [WEB]


@pytest.mark.parametrize("kind", KINDS)
def test_another_declaration_makes_room_unless_a_cluster_keeps_it(kind: str) -> None:
    stage = Stage()
    first = stage.services(kind)
    first.adopt()
    first.commit()
    stage.does.clear()
    other = {"grace_ms": 5} if kind in ("systemd", "kubernetes") else {"stop": {"grace_ms": 5}}
    second = stage.services(kind, first, **other)
    for number in second.adopt():
        second.start(number)
    assert second.commit() == {}  # it is declared still: nobody is told that it is not
    grace = first.managed()[WEB].declaration.grace_ms * 1_000_000
    room = [f"destroy {grace}", "release"]
    assert stage.does == ([] if kind == "kubernetes" else [*room, "start", "release"])


def test_a_unit_that_is_called_otherwise_now_makes_room_and_is_put_back() -> None:
    stage = Stage()
    first = stage.of([declared("systemd", "web", KINDS["systemd"])])
    first.adopt()
    first.commit()
    stage.does.clear()
    second = stage.of([declared("systemd", "site", KINDS["systemd"])], first)
    assert second.adopt() == [SITE]
    second.start(SITE)
    assert second.undo() == {"site": "", "web": ""}
    grace = first.managed()[WEB].declaration.grace_ms * 1_000_000
    assert stage.does == [f"destroy {grace}", "release", "start", "destroy 0", "release", "start"]
    stage.does.clear()
    third = stage.of([declared("systemd", "site", KINDS["systemd"])], first)
    for number in third.adopt():
        third.start(number)
    assert third.commit() == {}
    assert stage.does == [f"destroy {grace}", "release", "start", "release"]


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "process"])
def test_what_an_earlier_executor_left_of_another_kind_ends_before_the_new_one_starts(kind: str) -> None:
    stage = Stage()
    earlier = declared(kind, "web", KINDS[kind])
    services = stage.of([declared("process", "web", KINDS["process"])], earlier=[earlier])
    for number in services.adopt():
        services.start(number)
    ends = ["adopt", f"destroy {earlier.grace_ms * 1_000_000}", "release"]
    assert stage.does == [*([] if kind == "kubernetes" else ends), "start"]
    assert services.refused == ({} if kind == "kubernetes" else {"web": ""})
    stage.does.clear()
    services.undo()
    back = ["destroy 0", "release", *([] if kind == "kubernetes" else ["start"]), "release"]
    assert stage.does == back


def test_what_was_left_under_another_name_is_put_back_and_nobody_is_told_of_a_service_that_is_not_declared() -> None:
    """Whoever hears of moves knows the services of now by number, and no others."""
    stage = Stage()
    earlier = declared("systemd", "web", KINDS["systemd"])
    services = stage.of([declared("systemd", "site", KINDS["systemd"])], earlier=[earlier])
    for number in services.adopt():
        services.start(number)
    assert services.undo() == {"site": "", "web": ""}
    assert stage.does[-2:] == ["start", "release"]  # as it was left, under its own name
    assert {number for number, _ in stage.moves} == {SITE}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_declared_any_more_after_a_restart_ends_when_the_takeover_is_final(kind: str) -> None:
    stage = Stage()
    earlier = declared(kind, "web", KINDS[kind])
    services = stage.of([], earlier=[earlier])
    assert services.adopt() == []
    assert stage.does == []
    assert services.commit() == ({} if kind == "kubernetes" else {"web": ""})
    ends = ["adopt", f"destroy {earlier.grace_ms * 1_000_000}", "release"]
    assert stage.does == ([] if kind == "kubernetes" else ends)
    assert Stage(NOTHING_LEFT, runs=False).of([], earlier=[earlier]).commit() == {}


def test_what_is_declared_as_before_a_restart_goes_on() -> None:
    stage = Stage()
    earlier = declared("systemd", "web", KINDS["systemd"])
    services = stage.of([earlier], earlier=[earlier])
    assert services.adopt() == []
    assert services.commit() == {}
    assert stage.does == ["adopt"]
    assert services.refused == {"web": ""}


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "kubernetes"])
def test_what_is_declared_otherwise_after_a_restart_makes_room_in_order_and_is_put_back(kind: str) -> None:
    stage = Stage()
    earlier = declared(kind, "web", KINDS[kind])
    other = {"grace_ms": 5} if kind == "systemd" else {"stop": {"grace_ms": 5}}
    for over in (False, True):
        stage.does.clear()
        services = stage.of([declared(kind, "web", KINDS[kind] | other)], earlier=[earlier])
        assert services.adopt() == [WEB]
        assert stage.does == []  # it goes on until its successor starts
        services.start(WEB)
        assert services.commit() == {} if over else services.undo() == {"web": ""}
        after = ["release"] if over else ["destroy 0", "release", "start", "release"]
        assert stage.does == ["adopt", f"destroy {earlier.grace_ms * 1_000_000}", "release", "start", *after]


def test_what_was_left_and_is_not_what_was_declared_then_is_not_put_back() -> None:
    stage = Stage("it is another", runs=False)
    earlier = declared("process", "web", KINDS["process"])
    services = stage.of([declared("systemd", "web", KINDS["systemd"])], earlier=[earlier])
    services.start(WEB)
    assert services.refused == {"web": "it is another"}
    stage.does.clear()
    assert services.undo() == {"web": ""}
    assert stage.does == ["destroy 0", "release", "release"]


def test_what_cannot_be_put_back_costs_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage()
    first = stage.of([declared("process", name, KINDS["process"]) for name in ("web", "site")])
    first.adopt()
    first.commit()
    over = KINDS["process"] | {"stop": {"grace_ms": 5}}
    second = stage.of([declared("process", name, over) for name in ("web", "site")], first)
    for number in second.adopt():
        second.start(number)
    real = Remembered.start

    def start(self: Remembered, on_cgroup: Any) -> Started:
        if self.name == "web":
            raise ServiceError("a file was replaced", id="service.digest")
        return real(self, on_cgroup)

    monkeypatch.setattr(Remembered, "start", start)
    told = second.undo()
    assert (told["site"], "a file was replaced" in told["web"]) == ("", True)
    assert first.managed()[SITE].running


def test_what_cannot_be_let_go_of_costs_no_other_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage()
    first = stage.of([declared("process", name, KINDS["process"]) for name in ("web", "site")])
    first.adopt()
    first.commit()
    second = stage.of([declared("process", "web", KINDS["process"] | {"stop": {"grace_ms": 5}})], first)
    for number in second.adopt():
        second.start(number)

    def release(self: Remembered) -> None:
        if self.name == "web":
            raise OSError("web.7: a killed task does not end")

    monkeypatch.setattr(Remembered, "release", release)
    assert second.commit() == {"site": ""}
    assert not first.managed()[SITE].running


def test_what_began_and_cannot_be_ended_gets_no_second_instance(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage()
    first = stage.of([declared("process", "web", KINDS["process"])])
    first.adopt()
    first.commit()
    second = stage.of([declared("process", "web", KINDS["process"] | {"stop": {"grace_ms": 5}})], first)
    for number in second.adopt():
        second.start(number)
    refusal = ServiceError("web cannot be ended", id="service.destroy")
    monkeypatch.setattr(Remembered, "destroy", lambda *_: (_ for _ in ()).throw(refusal))
    stage.does.clear()
    assert "web cannot be ended" in second.undo()["web"]
    assert stage.does == []


def test_what_cannot_be_ended_is_told_and_nothing_starts_beside_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage = Stage()
    refusal = ServiceError("web cannot be ended", id="service.destroy")
    monkeypatch.setattr(Remembered, "destroy", lambda *_: (_ for _ in ()).throw(refusal))
    earlier = [declared("systemd", "web", KINDS["systemd"])]
    services = stage.of([declared("process", "web", KINDS["process"])], earlier=earlier)
    with pytest.raises(ServiceError):
        services.start(WEB)
    assert stage.does == ["adopt"]
    (told,) = stage.of([], earlier=earlier).commit().items()
    assert told[0] == "web"
    assert "web cannot be ended" in told[1]
    first = stage.of(earlier)
    first.adopt()
    assert "web cannot be ended" in stage.of([], first).commit()["web"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_end_of_everything_ends_only_what_this_node_runs(kind: str) -> None:
    stage = Stage()
    services = stage.services(kind)
    services.adopt()
    stage.does.clear()
    services.stop_all()
    assert bool(stage.does) == (kind != "kubernetes")


def test_a_kind_without_a_cgroup_says_so() -> None:
    services = Stage().services("kubernetes")
    with pytest.raises(ServiceError) as refusal:
        services.cgroup(WEB)
    assert refusal.value.id == "service.ability"
    assert services.healthy(WEB) == ""
    with pytest.raises(ServiceError) as refusal:
        Stage(runs=False).services("process").cgroup(WEB)
    assert refusal.value.id == "service.not-running"
    with pytest.raises(ServiceError) as refusal:
        services.name(1)
    assert refusal.value.id == "service.unknown"


def test_the_tables_of_abilities_speak_of_every_kind_and_of_real_actions() -> None:
    assert ABILITIES.keys() == KINDS.keys()
    assert NEEDS.keys() <= set(ACTIONS)
    assert set(NEEDS.values()) <= ABILITIES["process"]

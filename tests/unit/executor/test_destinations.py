"""From what services listen on to what the breaker is armed with: addresses, namespaces, values of their own."""

from __future__ import annotations

import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pointcall_attest.manifest import Circuit, Errno, Listen, Manifest
from pointcall_executor.arming import ArmingError, _check_circuits, destinations_of, node_wide, policies_of, topology_of
from pointcall_executor.core.event import Destination
from pointcall_executor.kernel.breaker import CircuitPolicy
from pointcall_executor.resolvers import Resolvers
from pointcall_runbook.vocabulary import Address, service
from tests.unit.signing.world import service as row
from tests.unit.signing.world import statement

HERE = 77


def to(address: str, port: int = 80, netns: int = 0, protocol: int = 6) -> Destination:
    return Destination(Address.parse(address), port, netns, protocol)


def manifest(*places: dict[str, Any], **over: Any) -> Manifest:
    return Manifest.parse(statement(services=[row(listen=list(places))], **over))


@pytest.mark.parametrize(
    ("declared", "watched"),
    [("10.0.0.7", "10.0.0.7"), ("0.0.0.0", "127.0.0.1"), ("::", "::1"), ("::ffff:a00:7", "10.0.0.7")],
)
def test_a_destination_is_watched_where_its_clients_reach_it(declared: str, watched: str) -> None:
    made = manifest({"address": declared, "port": 80})
    assert destinations_of(made, HERE) == {to(watched, netns=HERE): service("db").number}
    assert topology_of(made).listening(to(watched, netns=HERE)) == service("db").number
    assert topology_of(made).listening(to(watched, netns=0)) == service("db").number


@pytest.mark.parametrize(
    ("address", "wide"),
    [
        ("10.0.0.7", True),
        ("2001:db8::1", True),
        ("127.0.0.1", False),
        ("127.9.9.9", False),
        ("::1", False),
        ("::ffff:7f00:1", False),
    ],
)
def test_loopback_is_never_node_wide(address: str, wide: bool) -> None:
    assert node_wide(to(address, netns=HERE)).netns == (0 if wide else HERE)


def test_what_any_address_means_is_never_node_wide() -> None:
    for made in (manifest({"address": "0.0.0.0", "port": 80}), manifest({"address": "::", "port": 80})):
        assert [node_wide(d).netns for d in destinations_of(made, HERE)] == [HERE]


def test_values_of_a_destination_reach_its_circuit() -> None:
    circuit = {
        "threshold": 3, "window_ms": 5000, "cooldown_ms": 250, "percent": 50, "min_attempts": 10,
        "refuse_errno": "ECONNREFUSED", "abandoned": False,
    }  # fmt: skip
    made = manifest({"address": "10.0.0.7", "port": 80, "circuit": circuit}, {"address": "10.0.0.7", "port": 81})
    assert policies_of(made) == {
        to("10.0.0.7"): CircuitPolicy(3, 50, 10, 5000, 250, errno.ECONNREFUSED, abandoned=False),
        to("10.0.0.7", 81): CircuitPolicy(),
    }
    assert set(circuit) == set(Circuit.model_fields) == set(CircuitPolicy.__dataclass_fields__) - {"watch_only"}


def test_every_name_of_an_errno_is_one_here() -> None:
    for name in Errno.__args__:  # type: ignore[attr-defined]
        assert 0 < getattr(errno, name) < 4096


def test_the_bounds_of_the_manifest_are_within_the_kernels() -> None:
    most = {"threshold": 16_383, "window_ms": 86_400_000, "cooldown_ms": 86_400_000, "percent": 100}
    for policy in policies_of(manifest({"address": "::1", "port": 1, "circuit": most | {"min_attempts": 10**6}})):
        assert policy.port == 1


@pytest.mark.parametrize("other", [{"address": "127.0.0.1"}, {"address": "0.0.0.0"}])
def test_one_destination_has_one_circuit(other: dict[str, Any]) -> None:
    one = {"address": "127.0.0.1", "port": 80, "circuit": {"threshold": 3}}
    again = other | {"port": 80, "circuit": {"threshold": 3}}
    assert len(policies_of(manifest(one, again))) == 1
    for circuit in ({"threshold": 4}, None):
        wrong = other | {"port": 80} | ({"circuit": circuit} if circuit else {})
        with pytest.raises(ArmingError) as refused:
            policies_of(manifest(one, wrong))
        assert (refused.value.id, refused.value.got) == ("arm.circuit", "tcp://127.0.0.1:80")


@pytest.mark.parametrize("other", ["127.0.0.1", "0.0.0.0", "::ffff:7f00:1"])
def test_two_services_do_not_share_a_destination(other: str) -> None:
    def of(name: str, address: str, protocol: str = "tcp") -> Any:
        return SimpleNamespace(name=name, listen=[Listen(address=address, port=80, protocol=protocol)])  # type: ignore[arg-type]

    both: Any = SimpleNamespace(services=[of("db", "127.0.0.1"), of("web", other)])
    with pytest.raises(ArmingError) as refused:
        destinations_of(both, HERE)
    assert (refused.value.id, refused.value.got) == ("arm.destination", "tcp://127.0.0.1:80 of db and web")
    apart: Any = SimpleNamespace(services=[of("db", "127.0.0.1"), of("web", other, "udp")])
    assert [service("db").number, service("web").number] == list(destinations_of(apart, HERE).values())


def test_a_circuit_without_a_breaker_is_a_promise_that_nobody_keeps() -> None:
    place = {"address": "10.0.0.7", "port": 80, "circuit": {"threshold": 3}}
    with pytest.raises(ArmingError) as refused:
        _check_circuits(manifest(place))
    assert (refused.value.id, refused.value.want) == ("arm.needs", "sensor breaker in the manifest")
    _check_circuits(manifest({"address": "10.0.0.7", "port": 80}))
    places = [Listen(address="10.0.0.7", port=80, circuit=Circuit(threshold=3))]
    sensors = [SimpleNamespace(name="breaker")]
    watched: Any = SimpleNamespace(services=[SimpleNamespace(name="db", listen=places)], sensors=sensors)
    _check_circuits(watched)


RESOLV = """# generated
search example
nameserver 10.0.0.2
nameserver\t2001:db8::53
nameserver fe80::1%eth0 trailing
nameserver not-an-address
nameserver
; nameserver 10.0.0.9
options edns0
"""


@pytest.mark.parametrize(
    ("destination", "protected"),
    [
        (to("10.0.0.2", 53), True),
        (to("10.0.0.2", 53, protocol=17), True),
        (to("10.0.0.2", 853), False),
        (to("10.0.0.9", 53), False),
        (to("2001:db8::53", 53), True),
        (to("fe80::1", 53), True),
        (to("127.0.0.53", 53, netns=5), True),
        (to("::1", 53), True),
        (to("127.0.0.1", 5432), False),
    ],
)
def test_the_resolvers_of_a_node(destination: Destination, protected: bool) -> None:
    assert (destination in Resolvers.parse(RESOLV)) is protected


def test_without_the_file_loopback_is_asked(tmp_path: Any) -> None:
    assert Resolvers.read(tmp_path / "none") == Resolvers()
    assert to("127.0.0.1", 53) in Resolvers()
    (tmp_path / "resolv.conf").write_bytes(b"nameserver 10.0.0.2\nnameserver \xff\n")
    assert Resolvers.read(tmp_path / "resolv.conf") == Resolvers(frozenset({Address.parse("10.0.0.2")}))


@pytest.mark.parametrize("kind", ["folder", "loop", "forbidden"])
def test_a_file_that_is_there_and_cannot_be_read_is_no_reason_to_arm_without_it(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "resolv.conf"
    if kind == "folder":
        place.mkdir()
    elif kind == "loop":
        place.symlink_to(place)
    else:

        def forbidden(*_: Any, **__: Any) -> str:
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr(Path, "read_text", forbidden)
    with pytest.raises(ArmingError) as refusal:
        Resolvers.read(place)
    assert (refusal.value.id, refusal.value.want) == ("arm.resolvers", f"a file that the executor may read: {place}")
    assert refusal.value.got
    assert "protect_resolvers" in refusal.value.hint


def test_a_dangling_link_is_no_file(tmp_path: Path) -> None:
    place = tmp_path / "resolv.conf"
    place.symlink_to(tmp_path / "not/yet")
    assert Resolvers.read(place) == Resolvers()


@pytest.mark.parametrize("address", ["fe80::1%eth0", "010.0.0.1", "::FFFF:7F00:1", "localhost"])
def test_an_address_has_one_spelling_and_no_zone(address: str) -> None:
    with pytest.raises(ValueError, match=r"a circuit has no zone|write the address|does not appear"):
        Listen(address=address, port=80)

"""The whole matrix of methods and roles, called for real. The table below is typed by hand, as a second opinion."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from pointcall_executor.api.messages import pb
from pointcall_executor.api.roles import METHODS, Role, permitted
from tests.unit.api.conftest import Api

O, U, A, R = Role.OPERATOR, Role.AUDITOR, Role.AGENT, Role.RELYING_PARTY  # noqa: E741
EXPECTED = {
    "pointcall.v1.Runs/ListRuns": {O, U, A},
    "pointcall.v1.Runs/GetRun": {O, U, A},
    "pointcall.v1.Runs/GetReceipt": {O, U, A},
    "pointcall.v1.Status/GetStatus": {O, U, A},
    "pointcall.v1.Status/GetEvidence": {O, U, R},
    "pointcall.v1.Status/ListWaiting": {O, U, A},
    "pointcall.v1.Events/ListEvents": {O, U},
    "pointcall.v1.Proposals/SubmitProposal": {O, A},
    "pointcall.v1.Proposals/ListProposals": {O, U, A},
    "pointcall.v1.Proposals/GetProposal": {O, U, A},
    "pointcall.v1.Control/Arm": {O},
    "pointcall.v1.Control/Disarm": {O},
    "pointcall.v1.Control/Pause": {O},
    "pointcall.v1.Control/Resume": {O},
    "pointcall.v1.Control/TripCircuit": {O},
    "pointcall.v1.Control/ReleaseCircuit": {O},
    "pointcall.v1.Control/Approve": {O},
    "pointcall.v1.Control/Acknowledge": {O},
    "pointcall.v1.Control/BeginDrill": {O},
    "pointcall.v1.Control/EndDrill": {O},
    "pointcall.v1.Control/RecordProbe": {O},
    "pointcall.v1.Control/PruneLog": {O},
    "pointcall.v1.Control/EraseLog": {O},
    "pointcall.v1.Control/NoSuchMethod": set(),
    "pointcall.v2.Control/Arm": set(),
    "grpc.health.v1.Health/Check": {O, U, A, R},
    "grpc.health.v1.Health/Watch": set(),
    "grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": {O, U, A},
}


def test_the_table_names_every_method_of_the_proto() -> None:
    declared = {f"/{s.full_name}/{m.name}" for s in pb.DESCRIPTOR.services_by_name.values() for m in s.methods}
    assert declared == {m for m in METHODS if m.startswith("/pointcall.")}


def test_only_operators_change_the_node() -> None:
    assert {role for row in METHODS.values() if row.mutating for role in row.roles} == {O}
    assert {m for m, row in METHODS.items() if row.mutating} == {m for m in METHODS if "/pointcall.v1.Control/" in m}


@pytest.mark.parametrize("method", EXPECTED)
def test_the_table_says_what_was_meant(method: str) -> None:
    assert {role for role in Role if permitted(role, f"/{method}")} == EXPECTED[method]


@pytest.mark.parametrize("role", Role)
def test_each_cell_is_enforced(api: Api, role: Role) -> None:
    with grpc.insecure_channel(f"unix:{api.server.socket(role)}") as channel:
        let_through = {m for m in EXPECTED if _status(channel, m) is not grpc.StatusCode.PERMISSION_DENIED}
    assert let_through == {m for m, roles in EXPECTED.items() if role in roles}


def _status(channel: Any, method: str) -> grpc.StatusCode:
    """What an empty request gets. Empty requests are refused by most methods, but only after the role."""
    if method.endswith("Info"):
        stream = channel.stream_stream(f"/{method}")(iter([b""]), timeout=5)
        try:
            next(stream)
        except grpc.RpcError as failure:
            return failure.code()
        return grpc.StatusCode.OK
    try:
        channel.unary_unary(f"/{method}")(b"", timeout=5)
    except grpc.RpcError as failure:
        return failure.code()
    return grpc.StatusCode.OK

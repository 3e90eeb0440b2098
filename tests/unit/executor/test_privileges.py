"""What is given up is gone: tried in a child, with real system calls."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from pointcall_executor.privileges import CAPABILITIES, NEEDED
from pointcall_executor.syscall_filter import REFUSED

ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root has privileges to give up")
PRELUDE = """
import ctypes, errno, json, os, resource, socket, subprocess, sys, threading
from pointcall_executor import privileges, syscall_filter
libc = ctypes.CDLL(None, use_errno=True)
def tried(call, *args):
    try:
        result = call(*args)
    except OSError as error:
        return errno.errorcode[error.errno]
    if isinstance(result, int) and result < 0:
        return errno.errorcode[ctypes.get_errno()]
    return "done"
"""


def child(program: str) -> Any:
    """The JSON that the program prints."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + program],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@ROOT
def test_only_what_is_needed_is_kept_and_nothing_comes_back() -> None:
    told = child(
        """
kept = privileges.drop("", [], ["CAP_DAC_READ_SEARCH"])
status = open("/proc/self/status").read()
sub = subprocess.run(["cat", "/proc/self/status"], capture_output=True, text=True).stdout
bits = lambda text, name: int(text.split(name + ":")[1].split()[0], 16)
print(json.dumps({
    "kept": kept, "eff": bits(status, "CapEff"), "inh": bits(status, "CapInh"), "bnd": bits(status, "CapBnd"),
    "amb": bits(status, "CapAmb"), "child": bits(sub, "CapEff"), "nnp": "NoNewPrivs:\\t1" in status,
    "dump": libc.prctl(3, 0, 0, 0, 0), "chroot": tried(os.chroot, "/"), "nice": tried(os.nice, -5),
    "raw": tried(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW)), "uid": tried(os.setuid, 1),
}))"""
    )
    wanted = {CAPABILITIES[n] for n in (*NEEDED, "CAP_DAC_READ_SEARCH")}
    mask = sum(1 << n for n in wanted)
    assert set(told["kept"]) == {*NEEDED, "CAP_DAC_READ_SEARCH"}
    assert (told["eff"], told["bnd"], told["child"]) == (mask, mask, mask)
    assert (told["inh"], told["amb"], told["nnp"], told["dump"]) == (0, 0, True, 0)
    assert {told["chroot"], told["uid"], told["raw"]} == {"EPERM"}
    assert told["nice"] in ("EACCES", "EPERM")


@ROOT
def test_another_user_keeps_the_capabilities_and_loses_the_rest() -> None:
    told = child(
        """
privileges.drop("nobody", [4], [])
print(json.dumps({
    "uids": os.getresuid(), "groups": sorted(os.getgroups()), "eff": sorted(privileges.effective()),
    "shadow": tried(lambda: open("/etc/shadow").close()), "root": tried(os.setuid, 0),
}))"""
    )
    assert set(told["uids"]) == {65534}
    assert 4 in told["groups"]
    assert told["eff"] == sorted(CAPABILITIES[n] for n in NEEDED)
    assert (told["shadow"], told["root"]) == ("EACCES", "EPERM")


@ROOT
def test_a_thread_that_is_there_already_is_an_error() -> None:
    told = child(
        """
end = threading.Event()
thread = threading.Thread(target=end.wait); thread.start()
try:
    privileges.drop("", [], [])
    found = "nothing"
except privileges.PrivilegeError as error:
    found = error.id
end.set(); thread.join()
print(json.dumps(found))"""
    )
    assert told == "privilege.thread"


@ROOT
@pytest.mark.parametrize(("user", "error"), [("no-such-account", "privilege.user")])
def test_an_account_that_is_not_there_is_an_error(user: str, error: str) -> None:
    told = child(
        f"""
try:
    privileges.drop({user!r}, [], [])
    found = "nothing"
except privileges.PrivilegeError as refusal:
    found = refusal.id
print(json.dumps(found))"""
    )
    assert told == error


def test_one_who_is_not_root_has_nothing_to_give_up_and_still_gets_no_new_privileges() -> None:
    told = child(
        """
if os.getuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
kept = privileges.drop("", [], [])
print(json.dumps([kept, "NoNewPrivs:\\t1" in open("/proc/self/status").read()]))"""
    )
    assert told == [[], True]


def test_limits_are_set_and_never_raised() -> None:
    told = child(
        """
resource.setrlimit(resource.RLIMIT_DATA, (1 << 28, 1 << 28))
privileges.limit(4096)
print(json.dumps([resource.getrlimit(n) for n in (resource.RLIMIT_CORE, resource.RLIMIT_DATA)]
                 + [resource.getrlimit(resource.RLIMIT_NOFILE)[0]]))"""
    )
    assert told[:2] == [[0, 0], [1 << 28, 1 << 28]]
    assert told[2] <= 8192


def test_memory_has_an_end() -> None:
    told = child(
        """
privileges.limit(128)
try:
    held = bytearray(1 << 30)
    found = "taken"
except MemoryError:
    found = "refused"
print(json.dumps(found))"""
    )
    assert told == "refused"


def test_refused_system_calls_fail_and_needed_ones_work() -> None:
    told = child(
        """
threads = []
seen = {}
ready, go = threading.Event(), threading.Event()
def other():
    ready.set(); go.wait()
    seen["thread"] = tried(libc.ptrace, 0, 0, 0, 0)
thread = threading.Thread(target=other); thread.start(); ready.wait()
rules = syscall_filter.apply()
go.set(); thread.join()
seen |= {
    "rules": rules, "ptrace": tried(libc.ptrace, 0, 0, 0, 0), "mount": tried(libc.mount, 0, 0, 0, 0, 0),
    "unshare": tried(libc.unshare, 0x10000000), "setns": tried(libc.setns, 0, 0),
    "bpf_is_not_refused": tried(libc.syscall, 321, 99, 0, 0),
    "io_uring": tried(libc.syscall, 425, 1, 0), "keyctl": tried(libc.syscall, 250, 0, 0, 0, 0, 0),
    "alg": tried(lambda: socket.socket(38, socket.SOCK_SEQPACKET).close()),
    "packet": tried(lambda: socket.socket(17, socket.SOCK_RAW).close()),
    "inet": tried(lambda: socket.socket().close()),
    "unix": tried(lambda: socket.socket(socket.AF_UNIX).close()),
    "netlink": tried(lambda: socket.socket(16, socket.SOCK_RAW, 4).close()),
    "child": subprocess.run(["true"]).returncode,
    "in_child": subprocess.run([sys.executable, "-c", "import ctypes; l = ctypes.CDLL(None, use_errno=True); "
        "l.ptrace(0, 0, 0, 0); print(ctypes.get_errno())"], capture_output=True, text=True).stdout.strip(),
}
late = threading.Thread(target=lambda: seen.update(late="ran")); late.start(); late.join()
print(json.dumps(seen))"""
    )
    names = ("thread", "ptrace", "mount", "unshare", "setns", "io_uring", "keyctl", "alg", "packet")
    assert {told[name] for name in names} == {"EPERM"}
    assert told["bpf_is_not_refused"] in ("EINVAL", "EPERM" if os.geteuid() else "EINVAL")
    assert (told["inet"], told["unix"], told["netlink"], told["child"], told["late"]) == (
        "done",
        "done",
        "done",
        0,
        "ran",
    )
    assert told["in_child"] == "1"
    assert told["rules"] > 90


def test_without_the_library_it_is_an_error_and_not_a_missing_filter() -> None:
    told = child(
        """
sys.modules["pyseccomp"] = None
try:
    syscall_filter.apply()
    found = "nothing"
except syscall_filter.FilterError as error:
    found = [error.id, error.hint]
print(json.dumps(found))"""
    )
    assert told[0] == "privilege.seccomp"
    assert "libseccomp2" in told[1]


def test_what_the_executor_itself_needs_is_not_refused() -> None:
    refused = {name for names in REFUSED.values() for name in names}
    assert not refused & {
        "bpf",
        "perf_event_open",
        "execve",
        "clone",
        "prctl",
        "pidfd_send_signal",
        "eventfd2",
        "seccomp",
    }

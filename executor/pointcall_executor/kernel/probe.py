"""What this kernel grants, found out by loading and attaching, never by its version or configuration.

BTF and the name `bpf` in the LSM list prove nothing: a kernel may list a hook and refuse it. Everything that is loaded
here is gone when `probe` returns. Spec: docs/spec/kernel-abi.md section 6.
"""

from __future__ import annotations

import os
import platform
import struct
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pointcall_executor.kernel import bpf, btf
from pointcall_executor.kernel.bcc_probe import find_interpreter
from pointcall_executor.kernel.blob import Blob
from pointcall_executor.kernel.cgroup import find_root
from pointcall_executor.kernel.drill import qdiscs
from pointcall_executor.kernel.errors import KernelError
from pointcall_executor.kernel.libbpf import installed
from pointcall_executor.kernel.loader import load
from pointcall_executor.kernel.ring import MAP_TYPE_RINGBUF, ORDERED_MACHINES

BLOBS: Final = Path(__file__).resolve().parent.parent / "blobs"
CAPABILITIES: Final = {"CAP_NET_ADMIN": 12, "CAP_PERFMON": 38, "CAP_BPF": 39}
TRACEPOINTS: Final = {  # tp_btf target -> what it is needed for
    "inet_sock_set_state": "the breaker's detector",
    "inet_sk_error_report": "the breaker's detector of connected UDP",
    "mark_victim": "OOM kills",
    "sched_process_exit": "process exits",
}
OPTIONAL_TRACEPOINTS: Final = {
    "tcp_retransmit_skb": "sensor transport: retransmission storms, slow connects",
    "tcp_receive_reset": "sensor transport: resets of established connections",
    "block_rq_issue": "sensor storage: block latency and errors",
    "block_rq_complete": "sensor storage: block latency and errors",
    "fuse_request_send": "sensor fuse: FUSE latency (since 6.12)",
    "fuse_request_end": "sensor fuse: FUSE latency (since 6.12)",
    "ext4_sync_file_enter": "sensor fsync: ext4 latency (where ext4 is loaded)",
    "ext4_sync_file_exit": "sensor fsync: ext4 latency (where ext4 is loaded)",
    "sys_exit": "sensor syscalls: anomalies, on request",
}
GATES: Final = {
    "connect4": bpf.AttachType.CGROUP_INET4_CONNECT,
    "connect6": bpf.AttachType.CGROUP_INET6_CONNECT,
    "sendmsg4": bpf.AttachType.CGROUP_UDP4_SENDMSG,
    "sendmsg6": bpf.AttachType.CGROUP_UDP6_SENDMSG,
}
GATE_SECTIONS: Final = frozenset(f"cgroup/{name}" for name in GATES)
TRAMPOLINES: Final = {
    "fentry": (bpf.ProgramType.TRACING, bpf.AttachType.TRACE_FENTRY, "bpf_fentry_test1"),
    "lsm": (bpf.ProgramType.LSM, bpf.AttachType.LSM_MAC, "bpf_lsm_file_open"),
}
TRAMPOLINE_USES: Final = {"fentry": "sensor vfs", "lsm": "sensor tamper"}
BLOB_USES: Final = {  # sensor of a manifest -> what it is for
    "breaker": "sensor breaker: the reflex; CircuitOpened, CircuitClosed, CircuitStuck",
    "connections": "sensor connections: the action kill_connections",
    "drill": "sensor drill: rehearsals",
    "fsync": "sensor fsync: FilesystemSlow on ext4",
    "fuse": "sensor fuse: FilesystemSlow on FUSE",
    "isolate": "sensor isolate: the action isolate",
    "lifecycle": "sensor lifecycle: OomKilled, ProcessExited",
    "storage": "sensor storage: FilesystemSlow, DiskError on block devices",
    "syscalls": "sensor syscalls: SyscallUnusual; slows every system call",
    "tamper": "sensor tamper: nobody else swaps or removes our links",
    "transport": "sensor transport: ConnectSlow, resets, retransmissions",
    "vfs": "sensor vfs: FilesystemSlow on any file system",
}
REQUIRED_BLOBS: Final = ("breaker", "lifecycle")
_RETURN: Final = {value: struct.pack("<BBhiBBhi", 0xB7, 0, 0, value, 0x95, 0, 0, 0) for value in (0, 1)}


@dataclass(frozen=True, slots=True)
class Feature:
    """One thing that the kernel grants or does not. `id` is stable; `detail` says why where it is absent."""

    id: str
    present: bool
    detail: str
    needed_for: str
    required: bool = True


def probe(blobs: Path = BLOBS) -> list[Feature]:
    """Every feature that the kernel room can use, the required ones first. Loads and unloads; changes nothing."""
    found = [*_basics(), *_gates(), *_tracing(), *_optional_tracing(), *_blobs(blobs), *_beside()]
    return sorted(found, key=lambda feature: not feature.required)


def probe_required(blobs: Path = BLOBS) -> list[Feature]:
    """The required features alone, in a third of the time."""
    return [f for f in (*_basics(), *_gates(), *_tracing(), *_blobs(blobs, REQUIRED_BLOBS)) if f.required]


def missing(features: list[Feature]) -> list[Feature]:
    """The required ones that are absent."""
    return [f for f in features if f.required and not f.present]


def absent_hooks(blob: Blob) -> list[str]:
    """Hooks that a blob attaches to and this kernel has not, each with the reason; empty where all are there."""
    wanted = {p.section for p in blob.programs}
    traced = sorted(s.removeprefix("tp_btf/") for s in wanted if s.startswith("tp_btf/"))
    found = [_tracepoint(name, "", number, required=True) for name, number in _tracepoints(traced).items()]
    found += _trampolines(wanted)
    if "iter/tcp" in wanted:
        found.append(_sock_destroy(btf.find(_vmlinux(), [(btf.Kind.FUNC, "bpf_sock_destroy")])))
    found += [_tried(s, "", lambda s=s: _gate(GATES[s.removeprefix("cgroup/")])) for s in wanted & GATE_SECTIONS]  # type: ignore[misc]
    return [f"{feature.id} ({feature.detail})" for feature in found if not feature.present]


def _vmlinux() -> bytes:
    try:
        return btf.VMLINUX.read_bytes()
    except OSError:
        return b""


def _tracepoints(names: Collection[str]) -> dict[str, int | None]:
    """Tracepoint -> BTF id of its type, None where the kernel has no such tracepoint."""
    raw = _vmlinux()
    ids = btf.find(raw, [(btf.Kind.TYPEDEF, f"btf_trace_{name}") for name in names]) if raw else {}
    return {name: ids.get((btf.Kind.TYPEDEF, f"btf_trace_{name}")) for name in names}


def _trampolines(sections: Collection[str]) -> Iterator[Feature]:
    """fentry, fexit and LSM hooks of these sections, each tried by loading."""
    kinds = {"fentry": TRAMPOLINES["fentry"][:2], "lsm": TRAMPOLINES["lsm"][:2]}
    kinds["fexit"] = (bpf.ProgramType.TRACING, bpf.AttachType.TRACE_FEXIT)
    parts = {s: s.partition("/")[::2] for s in sorted(sections) if s.partition("/")[0] in kinds}
    names = {s: (btf.Kind.FUNC, f"bpf_lsm_{name}" if kind == "lsm" else name) for s, (kind, name) in parts.items()}
    raw = _vmlinux()
    ids = btf.find(raw, list(names.values())) if raw and names else {}
    for section, (kind, _) in parts.items():
        yield _hook(section, "", ids.get(names[section]), *kinds[kind], required=True)


def _sock_destroy(ids: Mapping[tuple[btf.Kind, str], int]) -> Feature:
    present = (btf.Kind.FUNC, "bpf_sock_destroy") in ids
    detail = "in the kernel's BTF" if present else "absent (since 6.5)"
    return Feature("bpf_sock_destroy", present, detail, "killing established connections", required=False)


def _tried(id: str, needed_for: str, attempt: Callable[[], str], *, required: bool = True) -> Feature:
    try:
        return Feature(id, True, attempt(), needed_for, required)
    except (OSError, KernelError) as error:
        text = os.strerror(error.errno or 0) if isinstance(error, OSError) else error.got or error.message
        return Feature(id, False, text, needed_for, required)


def _basics() -> Iterator[Feature]:
    held, wanted = _capabilities(), " ".join(CAPABILITIES)
    absent = [name for name, bit in CAPABILITIES.items() if not held >> bit & 1]
    yield Feature("capabilities", not absent, f"missing: {' '.join(absent)}" if absent else wanted, "loading programs")
    machine = platform.machine()
    yield Feature("machine", machine in ORDERED_MACHINES, machine, "reading the ring from Python")
    yield _tried("cgroup2", "the gate's scope and service cgroups", lambda: str(find_root()))
    yield _tried("btf", "CO-RE relocation", lambda: f"{btf.VMLINUX.stat().st_size} bytes")
    yield _tried("ringbuf", "events", lambda: _map(MAP_TYPE_RINGBUF, 0, 0, 4096))
    yield _tried("bpffs", "pinning: protection that outlives the executor", _bpffs, required=False)
    yield _tried("map_hash", "the kernel's own SHA-256 of the constants", _map_hash, required=False)
    yield _tried("psi", "sensor pressure: pressure-stall triggers", _psi, required=False)


def _beside() -> Iterator[Feature]:
    """What is no hook, and not needed to protect anything."""
    yield _tried("fuse", "drill slow_file", _fuse, required=False)
    yield _tried("fq", "drill delay: a device with this qdisc", _fq, required=False)
    yield _tried("libbpf", "the second loader, for diagnosis", installed, required=False)
    yield _tried("bcc", "pointcall probe", lambda: str(find_interpreter()), required=False)
    yield _tried("headers", "pointcall probe", _headers, required=False)


def _fuse() -> str:
    os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    return "/dev/fuse"


def _fq() -> str:
    found = qdiscs()
    if "fq" not in found:
        raise KernelError("no device delays packets", id="kernel.drill.delay", got=f"only {', '.join(sorted(found))}")
    return "a device has it"


def _headers() -> str:
    folder = Path("/lib/modules", platform.release(), "build")
    if not folder.is_dir():
        raise FileNotFoundError(2, "no headers")
    return str(folder)


def _psi() -> str:
    Path("/proc/pressure/io").read_text()
    return "/proc/pressure"


def _capabilities() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("CapEff:")[1].split()[0], 16)


def _map(kind: int, key: int, value: int, entries: int) -> str:
    os.close(bpf.map_create(kind, key_size=key, value_size=value, max_entries=entries, name="pc_probe"))
    return "created"


def _bpffs() -> str:
    for line in Path("/proc/self/mounts").read_text().splitlines():
        if line.split()[2] == "bpf":
            return line.split()[1]
    raise FileNotFoundError(2, "no bpf file system is mounted")


def _map_hash() -> str:
    fd = bpf.map_create(bpf.MAP_TYPE_ARRAY, key_size=4, value_size=8, max_entries=1, name="pc_probe")
    try:
        bpf.map_update(fd, bytes(4), b"pointcal")
        bpf.map_freeze(fd)
        if bpf.map_hash(fd) is None:
            raise OSError(38, "the kernel does not hash maps (since 6.18)")
    finally:
        os.close(fd)
    return "SHA-256 of frozen array maps"


def _gates() -> Iterator[Feature]:
    for name, kind in GATES.items():
        yield _tried(f"cgroup/{name}", "the breaker's gate", lambda kind=kind: _gate(kind))  # type: ignore[misc]


def _gate(kind: bpf.AttachType) -> str:
    os.close(bpf.prog_load(bpf.ProgramType.CGROUP_SOCK_ADDR, _RETURN[1], name="pc_probe", attach_type=kind))
    return "loads"


def _tracing() -> Iterator[Feature]:
    for name, tracepoint in _tracepoints(TRACEPOINTS).items():
        yield _tracepoint(name, TRACEPOINTS[name], tracepoint, required=True)


def _optional_tracing() -> Iterator[Feature]:
    for name, tracepoint in _tracepoints(OPTIONAL_TRACEPOINTS).items():
        yield _tracepoint(name, OPTIONAL_TRACEPOINTS[name], tracepoint, required=False)
    names = [(btf.Kind.FUNC, target) for _, _, target in TRAMPOLINES.values()]
    names.append((btf.Kind.FUNC, "bpf_sock_destroy"))
    raw = _vmlinux()
    ids = btf.find(raw, names) if raw else {}
    for name, (program, attach, target) in TRAMPOLINES.items():
        number = ids.get((btf.Kind.FUNC, target))
        yield _hook(name, TRAMPOLINE_USES[name], number, program, attach, required=False)
    yield _sock_destroy(ids)


def _in_a_module(name: str) -> bool:
    """Whether a loaded module brings the tracepoint: the kernel's loader finds it there, too."""
    wanted = f"\0btf_trace_{name}\0".encode()
    modules = (path for path in btf.VMLINUX.parent.iterdir() if path != btf.VMLINUX) if btf.VMLINUX.exists() else ()
    return any(wanted in path.read_bytes() for path in modules)


def _tracepoint(name: str, why: str, number: int | None, *, required: bool) -> Feature:
    if number is None and _in_a_module(name):
        return Feature(f"tp_btf/{name}", True, "in the BTF of a module", why, required)
    return _hook(f"tp_btf/{name}", why, number, bpf.ProgramType.TRACING, bpf.AttachType.TRACE_RAW_TP, required=required)


def _hook(
    id: str,
    why: str,
    btf_id: int | None,
    program: bpf.ProgramType,
    attach: bpf.AttachType,
    *,
    required: bool,
) -> Feature:
    if btf_id is None:
        return Feature(id, False, "absent from the kernel's BTF", why, required)

    def attempt() -> str:
        os.close(bpf.prog_load(program, _RETURN[0], name="pc_probe", attach_type=attach, btf_id=btf_id))
        return "loads"

    return _tried(id, why, attempt, required=required)


def _blobs(folder: Path, names: Collection[str] = ()) -> Iterator[Feature]:
    """Those of these names; all without them."""
    paths = sorted(path for path in folder.glob("*.blob") if not names or path.stem in names)
    if not paths:
        yield Feature("blobs", False, "not built: make -C bpf", "everything in the kernel")
    for path in paths:
        required = path.stem in REQUIRED_BLOBS
        why = BLOB_USES.get(path.stem, "loads as a whole")
        yield _tried(f"blob/{path.stem}", why, lambda path=path: _blob(path), required=required)  # type: ignore[misc]


def _blob(path: Path) -> str:
    blob = Blob.parse(path.read_bytes())
    load(blob).close()
    return f"{len(blob.programs)} programs, sha256 {blob.sha256[:16]}"

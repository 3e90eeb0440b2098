"""Getting evidence from fakes that behave as the kernel documents, with every error injected."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pointcall_attest import cert_table, tdreport
from pointcall_attest.emulated import EmulatedSnp
from pointcall_attest.emulated_tdx import EmulatedTdx
from pointcall_executor.tee import configfs, guest_device, platform, quote_service
from pointcall_executor.tee.configfs import ConfigfsPlatform
from pointcall_executor.tee.guest_device import SnpDevice, TdxDevice
from pointcall_executor.tee.hardware import open_hardware
from pointcall_executor.tee.platform import PlatformError, probe, real_tee

DATA, MRTD = b"\x11" * 64, b"\x22" * 48
Make = Callable[[bytes], bytes]


@dataclass
class FakeTsm:
    """tsm/report as report.c does it: binary stores take effect at close and swallow their error; text ones tell."""

    provider: str
    make_blob: Make
    aux: bytes = b""
    fail: dict[str, int] = field(default_factory=dict)  # "read outblob" -> errno, once each
    lose_inblob: bool = False
    foreign_write: bool = False
    empty: bool = False
    generation: int = 0
    inblob: bytes = b""
    items: set[str] = field(default_factory=set)
    log: list[str] = field(default_factory=list)

    def _step(self, what: str) -> None:
        self.log.append(what)
        if code := self.fail.pop(what, 0):
            raise OSError(code, what)

    def make(self, item: str) -> None:
        self._step("make")
        assert item not in self.items
        self.items.add(item)

    def remove(self, item: str) -> None:
        self._step("remove")
        self.items.remove(item)

    def write(self, item: str, attribute: str, value: bytes) -> None:
        self._step(f"write {attribute}")
        if attribute == "inblob":
            if self.lose_inblob:
                return
            self.inblob = value
        elif not (value.isdigit() and int(value) <= 3):
            raise OSError(errno.EINVAL, attribute)
        self.generation = (self.generation + 1) % (1 << 64)

    def read(self, item: str, attribute: str) -> bytes:
        self._step(f"read {attribute}")
        match attribute:
            case "provider":
                return f"{self.provider}\n".encode()
            case "generation":
                return f"{self.generation}\n".encode()
            case "auxblob":
                return self.aux
        if self.foreign_write:
            self.generation += 1
        return b"" if self.empty else self.make_blob(self.inblob.ljust(64, b"\0"))


@pytest.fixture(scope="session")
def report(machine: Callable[..., EmulatedSnp]) -> Make:
    return lambda data: machine().report(data, b"\x22" * 48, bytes(32))


@pytest.fixture(scope="session")
def quote(td: Callable[..., EmulatedTdx]) -> Make:
    return lambda data: td().quote(data, MRTD)


@pytest.fixture(scope="session")
def table(machine: Callable[..., EmulatedSnp]) -> bytes:
    leaf, ca, ark = machine().certificates
    blobs = zip(("VCEK", "ASK", "ARK"), (leaf, ca, ark), strict=True)
    return cert_table.encode({cert_table.ENTRIES[name]: der for name, der in blobs})


def refusal(call: Callable[[], object]) -> PlatformError:
    with pytest.raises(PlatformError) as raised:
        call()
    return raised.value


def test_configfs_gives_snp_evidence_with_the_hosts_certificates(report: Make, table: bytes) -> None:
    files = FakeTsm("sev_guest", report, table)
    bundle = ConfigfsPlatform(files, privlevel=1).evidence(DATA)
    assert (bundle.platform, len(bundle.certificates)) == ("snp", 3)
    assert (files.generation, files.items, files.inblob) == (2, set(), DATA)
    assert ConfigfsPlatform(FakeTsm("sev_guest", report, bytes(4096))).evidence(DATA).certificates == ()


def test_configfs_gives_tdx_evidence_and_never_reads_auxblob(quote: Make) -> None:
    files = FakeTsm("tdx_guest", quote)
    assert ConfigfsPlatform(files, privlevel=1).evidence(DATA).platform == "tdx"
    assert "read auxblob" not in files.log
    assert "write privlevel" not in files.log


def test_generation_wraps_at_two_to_the_64(report: Make) -> None:
    assert ConfigfsPlatform(FakeTsm("sev_guest", report, generation=(1 << 64) - 1)).evidence(DATA).platform == "snp"


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"lose_inblob": True}, "generation went from 0 to 0"),
        ({"foreign_write": True}, "generation went from 0 to 2"),
        ({"empty": True}, "empty blob"),
        ({"provider": "arm_cca_guest"}, "an unknown provider"),
        ({"make_blob": lambda _: b"x" * 1184}, "no evidence"),
        ({"aux": b"\x01" * 64}, "no evidence"),
    ],
)
def test_configfs_refuses(report: Make, fault: dict[str, object], words: str) -> None:
    files = FakeTsm(**({"provider": "sev_guest", "make_blob": report} | fault))  # type: ignore[arg-type]
    error = refusal(lambda: ConfigfsPlatform(files).evidence(DATA))
    assert words in error.got
    assert files.items == set()


def test_configfs_refuses_evidence_over_other_bytes(report: Make) -> None:
    files = FakeTsm("sev_guest", lambda _: report(bytes(64)))
    assert "binds other bytes" in refusal(lambda: ConfigfsPlatform(files).evidence(DATA)).got


@pytest.mark.parametrize(
    "step", ["make", "read provider", "read generation", "write inblob", "read auxblob", "read outblob"]
)
@pytest.mark.parametrize("code", [errno.ENXIO, errno.EINVAL, errno.ETIMEDOUT, errno.EIO, errno.EFBIG, errno.EACCES])
def test_every_error_of_the_kernel_is_told_and_the_item_freed(report: Make, step: str, code: int) -> None:
    files = FakeTsm("sev_guest", report, fail={step: code})
    error = refusal(lambda: ConfigfsPlatform(files).evidence(DATA))
    assert error.id == "tee.configfs"
    assert errno.errorcode[code] in error.got
    assert files.items == set()


@pytest.mark.parametrize("code", [errno.EBUSY, errno.EINTR])
def test_a_busy_kernel_is_asked_again_but_not_for_ever(report: Make, code: int) -> None:
    once = FakeTsm("sev_guest", report, fail={"read outblob": code})
    assert ConfigfsPlatform(once).evidence(DATA).platform == "snp"

    def always(_: bytes) -> bytes:
        raise OSError(code, "busy")

    files = FakeTsm("sev_guest", always)
    assert errno.errorcode[code] in refusal(lambda: ConfigfsPlatform(files).evidence(DATA)).got
    assert (files.log.count("read outblob"), files.items) == (configfs.TRIES, set())


def test_a_wrong_privlevel_is_told_by_the_text_attribute(report: Make) -> None:
    error = refusal(lambda: ConfigfsPlatform(FakeTsm("sev_guest", report), privlevel=4).evidence(DATA))
    assert "EINVAL" in error.got


def test_generation_that_is_no_number(report: Make) -> None:
    files = FakeTsm("sev_guest", report)
    files.generation = "many"  # type: ignore[assignment]
    assert "not a number" in refusal(lambda: ConfigfsPlatform(files).evidence(DATA)).got


def test_the_kernels_files_are_read_and_written_whole(tmp_path: Path) -> None:
    files = configfs.KernelTsmFiles(tmp_path)
    files.make("one")
    (tmp_path / "one/inblob").write_bytes(b"old and longer")
    files.write("one", "inblob", b"new")
    assert files.read("one", "inblob") == b"new and longer"  # never truncated: the kernel would refuse O_TRUNC
    (tmp_path / "one/inblob").unlink()
    files.remove("one")
    assert list(tmp_path.iterdir()) == []


@dataclass
class FakeSnpFirmware:
    """The driver's ioctl: reads and writes through the addresses in the request, as sev-guest.c does."""

    make_report: Make
    table: bytes = b""
    code: int = 0
    exit_info: int = 0
    status: int = 0
    size: int = 1184

    def __call__(self, _: int, number: int, outer: bytearray) -> int:
        assert number == guest_device.SNP_GET_EXT_REPORT
        version, request_at, response_at, exit_info = guest_device.REQUEST.unpack(outer)
        assert (version, exit_info) == (1, 0xFFFF_FFFF_FFFF_FFFF)
        inner, table_at, room = guest_device.EXT_REQUEST.unpack(ctypes.string_at(request_at, 112))
        data, vmpl = guest_device.REPORT_REQUEST.unpack(inner)
        needed = -(-len(self.table) // 4096) * 4096
        if needed > room:
            ctypes.memmove(request_at + 104, struct.pack("<I", needed), 4)
            self._end(outer, 1 << 32)
            raise OSError(errno.EIO, "table too small")
        if self.code:
            self._end(outer, self.exit_info)
            raise OSError(self.code, "injected")
        ctypes.memmove(table_at, self.table, len(self.table))
        answer = struct.pack("<II24x", self.status, self.size) + self.make_report(data)
        ctypes.memmove(response_at, answer, len(answer))
        self._end(outer, 0)
        return vmpl

    @staticmethod
    def _end(outer: bytearray, exit_info: int) -> None:
        outer[24:32] = struct.pack("<Q", exit_info)


@pytest.fixture
def device(tmp_path: Path) -> Path:
    path = tmp_path / "device"
    path.write_bytes(b"")
    return path


def test_the_sizes_are_those_of_the_kernels_headers() -> None:
    sizes = (guest_device.REQUEST.size, guest_device.REPORT_REQUEST.size, guest_device.EXT_REQUEST.size)
    assert sizes == (32, 96, 112)
    assert guest_device.SNP_GET_REPORT >> 16 & 0x3FFF == 32
    assert guest_device.TDX_CMD_GET_REPORT0 >> 16 & 0x3FFF == guest_device.TDX_REQUEST_BYTES == 1088


@pytest.mark.parametrize("padding", [0, 5000])
def test_snp_device_gives_evidence_and_grows_the_table(report: Make, table: bytes, device: Path, padding: int) -> None:
    firmware = FakeSnpFirmware(report, table + bytes(padding))
    bundle = SnpDevice(device, 1, firmware).evidence(DATA)
    assert (bundle.platform, len(bundle.certificates)) == ("snp", 3)
    assert SnpDevice(device, 0, FakeSnpFirmware(report)).evidence(DATA).certificates == ()


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"code": errno.ENOTTY}, "message key was wiped"),
        ({"code": errno.EIO, "exit_info": 0x16}, "firmware error 0x16"),
        ({"code": errno.EIO, "exit_info": 2 << 32}, "host error 0x2"),
        ({"table": bytes(20 * 1024)}, "host error 0x1"),
        ({"status": 0x16}, "status 0x16"),
        ({"size": 0}, "0 bytes"),
        ({"make_report": lambda _: bytes(1184)}, "no evidence"),
        ({"table": b"\x01" * 100}, "no evidence"),
    ],
)
def test_snp_device_refuses(report: Make, device: Path, fault: dict[str, object], words: str) -> None:
    firmware = FakeSnpFirmware(**({"make_report": report} | fault))  # type: ignore[arg-type]
    error = refusal(lambda: SnpDevice(device, 0, firmware).evidence(DATA))
    assert (error.id, words in error.got) == ("tee.snp_device", True)


def test_snp_device_refuses_other_bytes_and_a_missing_device(report: Make, device: Path) -> None:
    other = FakeSnpFirmware(lambda _: report(bytes(64)))
    assert "binds other bytes" in refusal(lambda: SnpDevice(device, 0, other).evidence(DATA)).got
    missing = SnpDevice(device.with_name("none"), 0, other)
    assert "cannot be opened" in refusal(lambda: missing.evidence(DATA)).got


def td_report(data: bytes) -> bytes:
    values = {"type": tdreport.TYPES[0], "report_data": data, "mrtd": MRTD}
    bare = tdreport.LAYOUT.write(values)
    hashes = {"tee_tcb_info_hash": bare[256:495], "tdinfo_hash": bare[512:]}
    return tdreport.LAYOUT.write(values | {name: hashlib.sha384(part).digest() for name, part in hashes.items()})


def fake_tdx(_: int, number: int, buffer: bytearray) -> int:
    assert number == guest_device.TDX_CMD_GET_REPORT0
    buffer[64:] = td_report(bytes(buffer[:64]))
    return 0


def test_tdx_device_and_quote_service_give_evidence(quote: Make, device: Path) -> None:
    bundle = TdxDevice(lambda raw: quote(tdreport.parse(raw).report_data), device, fake_tdx).evidence(DATA)
    assert bundle.platform == "tdx"


@pytest.mark.parametrize(
    ("answer", "words"),
    [(lambda _: b"", "no evidence"), (lambda q: q(bytes(64)), "not of this TD")],
)
def test_tdx_device_refuses(quote: Make, device: Path, answer: Callable[[Make], bytes], words: str) -> None:
    found = refusal(lambda: TdxDevice(lambda _: answer(quote), device, fake_tdx).evidence(DATA))
    assert words in found.got
    assert found.id == "tee.tdx_device"


def test_tdx_device_tells_the_kernels_error(device: Path) -> None:
    def failing(*_: object) -> int:
        raise OSError(errno.EIO, "injected")

    assert "EIO" in refusal(lambda: TdxDevice(lambda raw: raw, device, failing).evidence(DATA)).got


def serve(answer: Callable[[bytes], bytes | None]) -> Callable[[], socket.socket]:
    """A quote service on a socket pair: reads one request, answers once, hangs up."""
    ours, theirs = socket.socketpair()

    def run() -> None:
        with theirs:
            size = int.from_bytes(theirs.recv(4), "big")
            request = b""
            while len(request) < size:
                request += theirs.recv(size - len(request))
            if (reply := answer(request)) is not None:
                theirs.sendall(reply)

    threading.Thread(target=run, daemon=True).start()
    return lambda: ours


def framed(body: bytes, *, kind: int = 1, error: int = 0, major: int = 1, size: int | None = None) -> bytes:
    message = struct.pack("<HHIII", major, 0, kind, size or 16 + len(body), error) + body
    return struct.pack(">I", len(message)) + message


def test_the_quote_service_is_asked_as_qgs_expects() -> None:
    raw = td_report(DATA)
    seen: list[bytes] = []

    def answer(request: bytes) -> bytes:
        seen.append(request)
        return framed(struct.pack("<II", 4, 5) + b"id..quote")

    assert quote_service.quote(raw, serve(answer)) == b"quote"
    assert seen == [struct.pack("<HHIIIII", 1, 0, 0, 16 + 8 + 1024, 0, 1024, 0) + raw]


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (None, "hung up"),
        (b"\0\0", "hung up"),
        (struct.pack(">I", 4) + b"1234", "an answer of 4 bytes"),
        (struct.pack(">I", 1 << 31), "an answer of"),
        (framed(struct.pack("<II", 0, 1) + b"q", kind=3), "another version"),
        (framed(struct.pack("<II", 0, 1) + b"q", major=2), "another version"),
        (framed(struct.pack("<II", 0, 1) + b"q", size=99), "another version"),
        (framed(struct.pack("<II", 0, 0), error=0x12001), "error 0x12001"),
        (framed(struct.pack("<II", 0, 0)), "sizes inside"),
        (framed(struct.pack("<II", 9, 1) + b"q"), "sizes inside"),
    ],
)
def test_the_quote_service_refuses(reply: bytes | None, words: str) -> None:
    error = refusal(lambda: quote_service.quote(td_report(DATA), serve(lambda _: reply)))
    assert (error.id, words in error.got) == ("tee.quote_service", True)


def test_a_service_that_is_not_there_is_told() -> None:
    def connect() -> socket.socket:
        raise ConnectionRefusedError(errno.ECONNREFUSED, "refused")

    assert "ConnectionRefusedError" in refusal(lambda: quote_service.quote(td_report(DATA), connect)).got


def test_probe_says_why_nothing_is_there(tmp_path: Path) -> None:
    findings = probe(tmp_path)
    assert [finding.available for finding in findings] == [False] * 5
    assert all(finding.why for finding in findings)
    assert real_tee(tmp_path) is None
    for name in ("snp", "tdx"):
        assert "configfs-tsm" in refusal(lambda name=name: open_hardware(name, tmp_path)).got  # type: ignore[misc]


def test_probe_finds_what_is_there(tmp_path: Path) -> None:
    for name in (platform.SNP_DEVICE, platform.TDX_DEVICE, platform.VSOCK_DEVICE):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    registers = tmp_path / platform.TDX_REGISTERS
    registers.mkdir(parents=True)
    (registers / "rtmr0:sha384").write_bytes(bytes(48))
    findings = {finding.what: finding for finding in probe(tmp_path)}
    assert [f.available for f in findings.values()] == [False, True, True, True, True]
    assert "rtmr0:sha384" in findings["TDX measurement registers"].why
    assert real_tee(tmp_path) == "/dev/sev-guest"
    assert isinstance(open_hardware("snp", tmp_path), SnpDevice)
    assert isinstance(open_hardware("tdx", tmp_path), TdxDevice)


def test_probe_asks_configfs_for_its_provider(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / platform.TSM_FOLDER
    folder.mkdir(parents=True)
    original = Path.mkdir
    assert real_tee(tmp_path) is None  # an ordinary folder has no provider file

    def refused(self: Path, *args: object, **options: object) -> None:
        if self.parent == folder:
            raise OSError(errno.ENXIO, "no provider")
        original(self)

    monkeypatch.setattr(Path, "mkdir", refused)
    assert "no provider is registered" in probe(tmp_path)[0].why

    def provided(self: Path, *args: object, **options: object) -> None:
        original(self)
        if self.parent == folder:
            (self / "provider").write_text("tdx_guest\n")

    monkeypatch.setattr(Path, "mkdir", provided)
    monkeypatch.setattr(Path, "rmdir", lambda self: [entry.unlink() for entry in self.iterdir()] and None)
    assert probe(tmp_path)[0].why == "provider tdx_guest"


def test_the_kernels_files_are_bounded_and_written_in_one_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = configfs.KernelTsmFiles(tmp_path)
    files.make("one")
    (tmp_path / "one/outblob").write_bytes(bytes(configfs.MAX_BLOB_BYTES + 1))
    with pytest.raises(OSError, match="no end") as raised:
        files.read("one", "outblob")
    assert raised.value.errno == errno.EFBIG
    monkeypatch.setattr(configfs.os, "write", lambda *_: 1)
    with pytest.raises(OSError, match="only a part"):
        files.write("one", "outblob", b"two")


def test_hardware_is_opened_through_configfs_where_it_has_the_provider(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [platform.Finding("configfs-tsm reports", True, "provider sev_guest")]
    monkeypatch.setattr("pointcall_executor.tee.hardware.probe", lambda _: found)
    assert isinstance(open_hardware("snp", tmp_path), ConfigfsPlatform)
    refusal(lambda: open_hardware("tdx", tmp_path))


def test_a_device_that_this_user_may_not_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dev").mkdir()
    (tmp_path / platform.SNP_DEVICE).write_bytes(b"")
    monkeypatch.setattr(platform.os, "access", lambda *_: False)
    assert "this user may not open it" in probe(tmp_path)[1].why


def test_the_kernels_ioctl_writes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guest_device.fcntl, "ioctl", lambda fd, number, buffer, mutate: int(mutate) + fd)
    assert guest_device.kernel_ioctl(4, 5, bytearray(1)) == 5


def test_vsock_connects_to_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    class Socket:
        closed = False

        def __init__(self, *family: int) -> None:
            assert family == (socket.AF_VSOCK, socket.SOCK_STREAM)

        def settimeout(self, seconds: float) -> None:
            assert seconds == quote_service.TIMEOUT_S

        def connect(self, address: tuple[int, int]) -> None:
            assert address == (2, 4050)
            if Socket.refuse:
                raise ConnectionRefusedError

        def close(self) -> None:
            Socket.closed = True

        refuse = False

    monkeypatch.setattr(quote_service.socket, "socket", Socket)
    assert isinstance(quote_service.vsock(), Socket)
    Socket.refuse = True
    with pytest.raises(ConnectionRefusedError):
        quote_service.vsock()
    assert Socket.closed

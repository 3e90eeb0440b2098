"""Services of kind `container`: made anew from an image that is named by its digest, through Podman's API.

The socket is a file of this node; nothing is pulled, so recovery needs no network. A container is never started again:
it is removed and made from its declaration. Which declaration it was made from stands in its label, for the next
executor. A freeze is done by the spawner on the container's cgroup: Podman's pause has no end.
Source: Podman 4 API, libpod.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, urlencode

from pointcall_attest.declaration import Container, ServiceDeclaration
from pointcall_executor.kernel.cgroup import Cgroup
from pointcall_executor.services.exchange import connected
from pointcall_executor.services.groups import Freezer, Place, group_of, v1_group_of
from pointcall_executor.services.managed import (
    ABILITIES,
    NOTHING_LEFT,
    OnCgroup,
    ServiceError,
    Started,
    nobody,
    not_running,
)
from pointcall_executor.services.reach import PODMAN_SOCKET
from pointcall_executor.services.ready import await_ready, described, unready
from pointcall_executor.services.spawning import Spawner, readable

ANSWER_SECONDS: Final = 60.0
MAX_ANSWER_BYTES: Final = 1 << 20
MAX_LOG_BYTES: Final = 1 << 20
LABEL: Final = "dev.pointcall.declaration"
ID_LENGTH: Final = 64
REMOVE_SECONDS: Final = 5.0
REMOVE_PAUSE_SECONDS: Final = 0.02
_BASE: Final = "/v4.0.0/libpod"
_NOT_FOUND: Final = 404
_SIGNALS: Final = {"TERM": 15, "INT": 2, "QUIT": 3, "HUP": 1, "KILL": 9}


class _Connection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: str, timeout_s: float) -> None:
        super().__init__("podman", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class PodmanRefusal(ServiceError):
    """Podman's own no: it has answered."""


class Podman:
    """Podman's API behind a Unix socket: one connection for each request, so that requests may be made at once."""

    def __init__(self, path: str = PODMAN_SOCKET) -> None:
        self._path = path

    def ask(
        self, method: str, path: str, body: dict[str, Any] | None = None, *, takes_s: float = 0.0, **query: Any
    ) -> dict[str, Any] | None:
        """The JSON object of the answer, {} if it has none; None for 404. ServiceError `service.manager` where it says
        no, or nothing for ANSWER_SECONDS longer than `takes_s`, in which what is asked for is done."""
        url = f"{_BASE}{path}" + (f"?{urlencode(query)}" if query else "")
        headers = {"Content-Type": "application/json"} if body is not None else {}
        connection = _Connection(self._path, ANSWER_SECONDS + takes_s)
        try:
            with connected(connection, ANSWER_SECONDS + takes_s):
                connection.request(method, url, None if body is None else json.dumps(body), headers)
                answer = connection.getresponse()
                raw = answer.read(MAX_ANSWER_BYTES)
            found = json.loads(raw) if raw else {}
        except (OSError, http.client.HTTPException, ValueError, RecursionError) as error:
            raise ServiceError(
                "Podman does not answer", id="service.manager", want=self._path, got=str(error) or repr(error),
                hint="is podman.socket active, and is the setting podman_socket right?",
            ) from error  # fmt: skip
        finally:
            connection.close()
        if answer.status == _NOT_FOUND:
            return None
        if answer.status >= 400:
            got = f"{answer.status} {found.get('message', '') if isinstance(found, dict) else ''}"
            raise PodmanRefusal("Podman refuses", id="service.manager", want=f"{method} {path}", got=got[:500])
        return found if isinstance(found, dict) else {}


class ContainerService:
    """One declared container. Thread-safe: one start or stop at a time."""

    def __init__(self, declaration: ServiceDeclaration, podman: Podman, spawner: Spawner) -> None:
        assert isinstance(declaration.body, Container)
        self.declaration, self._declared = declaration, declaration.body
        self.name = declaration.name
        self.abilities = ABILITIES["container"]
        self.ours = True
        self._podman, self._spawner = podman, spawner
        self._path = f"/containers/pointcall-{declaration.name}"
        self._lock = threading.RLock()
        self._freezer: Freezer | None = None
        self.pid = 0
        self._pidfd = -1
        self._id = ""  # Podman's
        self._place: Place | None = None

    @property
    def running(self) -> bool:
        """Whether the main process lives."""
        pidfd = self._pidfd
        return pidfd >= 0 and not readable(pidfd, 0)

    @property
    def held(self) -> bool:
        return self.running

    def found_in(self) -> int:
        return self._place.living_id() if self._place is not None else 0

    def alive(self) -> int:
        if self.running:
            return self.pid
        return min(self._place.living(), default=0) if self._place is not None else 0

    @property
    def cgroup_id(self) -> int:
        group = self._group()
        return group.id if group is not None else 0

    def _group(self) -> Cgroup | None:
        """The container's own v2 cgroup, named after it. Never that of Podman or of whoever started it."""
        group = group_of(self.pid) if self.running else None
        path = _own(group.path, self._id) if group is not None else None
        return Cgroup(path) if path is not None else None

    def _freezes(self) -> Freezer | None:
        group = self._group()
        if group is not None:
            return Freezer(group.path)
        v1 = v1_group_of(self.pid) if self.running else None
        path = _own(v1.folder, self._id) if v1 is not None else None
        return Freezer(path, v1=True) if path is not None else None

    # ---- start and stop --------------------------------------------------------------------------------------------

    def adopt(self) -> str:
        """Take over the container if it runs and was made from this very declaration and image."""
        with self._lock:
            if self.running:
                return ""
            wrong = self._differs()
            if wrong:
                self.destroy(self._declared.stop.grace_ms * 1_000_000)
            return wrong

    def _differs(self) -> str:
        about = self._podman.ask("GET", f"{self._path}/json")
        if about is None:
            return NOTHING_LEFT
        labels = (about.get("Config") or {}).get("Labels") or {}
        if labels.get(LABEL) != self.declaration.sha256:
            return "it was declared otherwise"
        if about.get("ImageDigest") != self._declared.digest:
            return "it was made from another image"
        if not self._take(about):
            return "it does not run"
        self._free(self._freezes())
        return unready(self._declared.ready, self._spawner.connecting)

    def _take(self, about: dict[str, Any]) -> bool:
        """Hold on to the main process of a container. False if there is none."""
        self._let_go()
        state = about.get("State") or {}
        pid = state.get("Pid") or 0
        try:
            self._pidfd = os.pidfd_open(pid) if state.get("Running") and pid > 0 else -1
        except OSError:
            return False
        self.pid = pid if self._pidfd >= 0 else 0
        self._id = str(about.get("Id") or "")
        group = self._group()
        self._place = Place(group) if group is not None else None
        return self.running

    def _let_go(self) -> None:
        pidfd, self._pidfd, self.pid = self._pidfd, -1, 0
        if pidfd >= 0:
            os.close(pidfd)

    def start(self, on_cgroup: OnCgroup = nobody) -> Started:
        """Find the image by its digest, make the container, start it, wait until it is ready."""
        begin = time.monotonic_ns()
        with self._lock:
            image = self._image()
            verified = time.monotonic_ns()
            self.destroy(0)
            try:
                if self._podman.ask("POST", "/containers/create", self._specification(image)) is None:
                    raise self._without_image("it was removed meanwhile")
                if self._podman.ask("POST", f"{self._path}/start") is None:
                    raise ServiceError(f"{self.name} is gone", id="service.ended", got="removed by somebody else")
                self._take(self._podman.ask("GET", f"{self._path}/json") or {})
                spawned = time.monotonic_ns()
                group = self._group()
                if group is not None:
                    on_cgroup(group.id)
                if not self.running:
                    raise ServiceError(f"{self.name} ended at once", id="service.ended", hint=self._hint)
                connect = self._spawner.connecting
                await_ready(self._declared.ready, connect, name=self.name, ended=self._ended, hint=self._hint)
            except BaseException:
                self.destroy(0)
                raise
            return Started(
                pid=self.pid,
                cgroup_id=group.id if group is not None else 0,
                files=1,
                verified_ns=verified - begin,
                spawned_ns=spawned - verified,
                ready_ns=time.monotonic_ns() - spawned,
                ready_for=described(self._declared.ready) or "its container was started",
            )

    @property
    def _hint(self) -> str:
        return f"see `podman logs pointcall-{self.name}`; a container that failed is removed: try it by hand"

    def _ended(self, seconds: float) -> bool:
        return readable(self._pidfd, seconds)

    def _image(self) -> str:
        """Id of the image on this node that has the declared digest. ServiceError `service.image`."""
        about = self._podman.ask("GET", f"/images/{quote(self._declared.image, safe='')}/json")
        digest = about.get("Digest") if about is not None else None
        if about is None or digest != self._declared.digest:
            raise self._without_image(str(digest or "no such image"))
        return str(about.get("Id"))

    def _without_image(self, got: str) -> ServiceError:
        return ServiceError(
            "the declared image is not on this node", id="service.image", want=self._declared.image, got=got,
            hint="pull it by this digest when the node is set up",
        )  # fmt: skip

    def _specification(self, image: str) -> dict[str, Any]:
        declared = self._declared
        limits: dict[str, Any] = {}
        if declared.limits.memory_bytes is not None:
            limits["memory"] = {"limit": declared.limits.memory_bytes}
        if declared.limits.processes is not None:
            limits["pids"] = {"limit": declared.limits.processes}
        mounts = [
            {
                "type": "bind",
                "source": mount.source,
                "destination": mount.target,
                "options": ["rbind", "ro" if mount.read_only else "rw"],
            }
            for mount in declared.mounts
        ]
        body: dict[str, Any] = {
            "name": f"pointcall-{self.name}",
            "image": image,
            "labels": {LABEL: self.declaration.sha256},
            "env": dict(declared.environment),
            "mounts": mounts,
            "netns": {"nsmode": declared.network},
            "cap_drop": ["ALL"],
            "cap_add": list(declared.capabilities),
            "no_new_privileges": True,
            "read_only_filesystem": declared.read_only_root,
            "restart_policy": "no",
            "stop_signal": _SIGNALS[declared.stop.signal],
            "log_configuration": {"driver": "k8s-file", "size": MAX_LOG_BYTES},
        }
        if declared.command:
            body["command"] = list(declared.command)
        if declared.user is not None:
            body["user"] = declared.user
        return body | ({"resource_limits": limits} if limits else {})

    def destroy(self, grace_ns: int) -> int:
        """Stop and remove the container; ns that it took. Not there is no error. One that cannot be removed is held on
        to: it lives on."""
        with self._lock:
            begin = time.monotonic_ns()
            self.thaw()
            if grace_ns > 0 and self.running:
                seconds = max(1, math.ceil(grace_ns / 1e9))
                with contextlib.suppress(PodmanRefusal):  # as of one that somebody has paused: it goes all the same
                    self._podman.ask("POST", f"{self._path}/stop", takes_s=seconds, timeout=seconds)
            self._remove()
            self._let_go()
            return time.monotonic_ns() - begin

    def _remove(self) -> None:
        """Podman refuses while it has not yet seen that a container ended by itself: then again, for a while."""
        deadline = time.monotonic() + REMOVE_SECONDS
        while True:
            try:
                self._podman.ask("DELETE", self._path, force="true", timeout=0)
                return
            except PodmanRefusal:
                if time.monotonic() > deadline:
                    raise
                time.sleep(REMOVE_PAUSE_SECONDS)

    def release(self) -> None:
        """Nothing is kept for a next start."""

    # ---- while it runs ---------------------------------------------------------------------------------------------

    def signal(self, number: int) -> None:
        if not self.running:
            raise not_running(self.name)
        self._podman.ask("POST", f"{self._path}/kill", signal=number)

    def freeze(self, until_ns: int) -> None:
        with self._lock:
            freezer = self._freezes()
            if freezer is None:
                raise not_running(self.name)
            self._freezer = freezer
            self._spawner.freeze(freezer, until_ns)

    def thaw(self) -> None:
        with self._lock:
            freezer, self._freezer = self._freezer, None
            self._free(freezer)

    def _free(self, freezer: Freezer | None) -> None:
        if freezer is not None:
            self._spawner.thaw(freezer)

    def frozen(self, until_ns: int) -> bool:
        freezer = self._freezer
        return freezer is not None and freezer.settled(until_ns)

    def healthy(self) -> str:
        if not self.running:
            return "its main process does not run"
        if (freezer := self._freezes()) is not None and freezer.frozen:  # also by somebody else's pause
            return "it is frozen"
        return unready(self._declared.ready, self._spawner.connecting)


def _own(path: Path, id: str) -> Path | None:
    """The part of a cgroup's path down to the folder that is named after the container; None if none is."""
    named = [folder for folder in (path, *path.parents) if len(id) == ID_LENGTH and id in folder.name]
    return named[-1] if named else None

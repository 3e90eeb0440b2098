"""What runs of a service in a cgroup that the settings do not name any more ends, before a second one is started.

Trust: the record is not trusted (record.py). A process is ended only in a cgroup that is called as an instance of this
service is, and in which the kernel says it lives; where it lives elsewhere nothing is ended and nothing may be started.
"""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

from pointcall_executor.services import record as records
from pointcall_executor.services.groups import ServiceGroups, instance_of
from pointcall_executor.services.managed import ServiceError
from pointcall_executor.services.record import RunRecord
from pointcall_executor.services.spawning import readable


def end_elsewhere(folder: Path, name: str, parent: str) -> str:
    """End the process that the record in `folder` names, with its cgroup, where that is not below `parent`; where it
    was, empty if nothing runs elsewhere. ServiceError `service.elsewhere` where it must not or cannot be ended."""
    record = records.read(folder)
    place = _place(record) if record is not None else None
    if record is None or place is None or _is_instance(place, PurePosixPath(parent), name):
        return ""
    recorded = PurePosixPath(record.cgroup)
    if not (place.is_relative_to(recorded) and _is_instance(place, recorded.parent, name)):
        raise _refused(name, place, "it is not known to be one of this service")
    try:
        ServiceGroups(record.cgroup).destroy()
    except OSError as error:
        raise _refused(name, place, str(error)) from error
    records.forget(folder, record.cgroup_id)
    return record.cgroup


def _is_instance(place: PurePosixPath, parent: PurePosixPath, name: str) -> bool:
    """Whether a cgroup is one of this service's below `parent`, or below such a one."""
    if ".." in place.parts or not place.is_relative_to(parent):
        return False
    return instance_of((*place.relative_to(parent).parts, "")[0]) == name


def _place(record: RunRecord) -> PurePosixPath | None:
    """The v2 cgroup below its root in which the process of the record lives now; None if it has ended."""
    if record.boot != records.boot_id():
        return None
    try:
        pidfd = os.pidfd_open(record.pid)
    except OSError:
        return None
    try:
        same = records.born(record.pid) == record.born
        rows = Path(f"/proc/{record.pid}/cgroup").read_text().splitlines() if same else []
        if not same or readable(pidfd, 0):
            return None
        return PurePosixPath(next(row[4:] for row in rows if row.startswith("0::/")))
    except (FileNotFoundError, ProcessLookupError):
        return None
    finally:
        os.close(pidfd)


def _refused(name: str, place: PurePosixPath, got: str) -> ServiceError:
    return ServiceError(
        f"{name} runs in another cgroup", id="service.elsewhere", want="one instance", got=f"/{place}: {got}",
        hint="end it there; if it is somebody else's process, remove the service's running.json",
    )  # fmt: skip

"""trusted_root.json: which log, certificate authority and timestamp keys count, and when each of them did. No I/O.

The library that verifies against it ignores the end of most windows. `Root.reduced_to` therefore gives a second
verifier that knows only what was valid at the time of signing. Spec: Sigstore `trustroot.proto`, TimeRange (closed).
"""

from __future__ import annotations

import datetime as dt
import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

from pointcall_attest import exact_json
from pointcall_attest.errors import AttestError, MalformedError, VerifyError

if TYPE_CHECKING:
    from sigstore.models import TrustedRoot
    from sigstore.verify import Verifier

T = TypeVar("T")
Rows = Mapping[str, Any]
MAX_ROOT_BYTES: Final = 1024 * 1024  # the public instance's is 7 KiB
WINDOWED: Final = ("tlogs", "ctlogs", "certificateAuthorities")  # those whose end the library ignores
AUTHORITIES: Final = ("certificateAuthorities", "timestampAuthorities")
_SERVICES: Final = ("caUrls", "oidcUrls", "rekorTlogUrls", "tsaUrls")
_MOMENT: Final = dt.timedelta(microseconds=1)


@dataclass(frozen=True)
class Root:
    """A trusted root: its plain rows, and the library's verifier for all of them."""

    rows: Rows

    @functools.cached_property
    def verifier(self) -> Verifier:
        """VerifyError `trust.root` if the library cannot use the root, for example because it names no authority."""
        return guarded(lambda: _verifier(self.rows), "trust.root")

    @staticmethod
    @functools.lru_cache(maxsize=4)
    def load(raw: bytes) -> Root:
        """The root of trusted_root.json, or of a ClientTrustConfig. MalformedError `trust.root`."""
        rows = exact_json.loads(raw, id="trust.root", max_bytes=MAX_ROOT_BYTES, what="the trusted root")
        rows = rows.get("trustedRoot", rows) if isinstance(rows, dict) else None
        if not isinstance(rows, dict):
            raise MalformedError("not a trusted root", id="trust.root", want="a JSON object")
        return Root(rows)

    def at(self, time: dt.datetime) -> Rows:
        """The rows that were valid at a time; timestamp authorities stay, the library judges each by its token."""
        return dict(self.rows) | {k: [row for row in self.rows.get(k, []) if in_window(row, time)] for k in WINDOWED}

    def reduced_to(self, time: dt.datetime) -> Verifier | None:
        """A verifier that knows only what was valid at a time; None if that is everything.

        The bundle must not choose the row: the log id of a Rekor v2 entry is not authenticated, and a retired log could
        borrow the id of a current one.
        """
        kept = self.at(time)
        if all(len(kept[kind]) == len(self.rows.get(kind, [])) for kind in WINDOWED):
            return None
        return _verifier(kept)


def guarded(call: Callable[[], T], id: str, kind: type[AttestError] = VerifyError) -> T:
    """The result of a call of the library. Whatever it raises is a refusal.

    It leaks ValueError and pydantic's ValidationError; a panic in its Rust parts is not even an Exception.
    """
    try:
        return call()
    except (AttestError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        text = f"{type(error).__name__}: {error}"
        raise kind("the bundle does not verify", id=id, want="a valid one", got=" ".join(text.split())[:300]) from None


def window(row: Rows) -> tuple[dt.datetime | None, dt.datetime | None]:
    """(start, end) of a row, both inclusive; None where it is not stated."""
    stated = row.get("publicKey", row).get("validFor", {})
    start, end = (stated.get(name) for name in ("start", "end"))
    return start and dt.datetime.fromisoformat(start), end and dt.datetime.fromisoformat(end)


def in_window(row: Rows, time: dt.datetime) -> bool:
    """Whether a row counted at a time. One without a start never did: that is malformed, not open."""
    start, end = window(row)
    return start is not None and start <= time and (end is None or time <= end)


def _verifier(rows: Rows) -> Verifier:
    from sigstore.verify import Verifier

    return Verifier(trusted_root=_library_root(rows))


def _library_root(rows: Rows) -> TrustedRoot:
    """A TrustedRoot from memory. `TrustedRoot.from_file` would open the file again after it was hashed."""
    from sigstore.models import ClientTrustConfig

    config = {
        "mediaType": "application/vnd.dev.sigstore.clienttrustconfig.v0.1+json",
        "trustedRoot": _as_the_library_reads_it(rows),
        "signingConfig": {
            "mediaType": "application/vnd.dev.sigstore.signingconfig.v0.2+json",
            "rekorTlogConfig": {"selector": "ANY"},
            "tsaConfig": {"selector": "ANY"},
        }
        | {name: [] for name in _SERVICES},
    }
    return ClientTrustConfig.from_json(json.dumps(config)).trusted_root


def _as_the_library_reads_it(rows: Rows) -> Rows:
    """The same root in the library's terms.

    It demands a common name of every authority, which older roots lack; and it takes the end of a timestamp authority's
    window for the first moment after it, where the format means the last moment within.
    """
    return dict(rows) | {kind: [_authority(row) for row in rows[kind]] for kind in AUTHORITIES if kind in rows}


def _authority(row: Rows) -> Rows:
    end = window(row)[1]
    named = dict(row) | {"subject": {"commonName": ""} | row.get("subject", {})}
    return named if end is None else named | {"validFor": row["validFor"] | {"end": (end + _MOMENT).isoformat()}}

"""The trusted roots of the public Sigstore instance and of its staging instance, as data, pinned by digest.

They are what verifies a file when no other root is given. A node's own trust policy names its root itself and never
falls back to these. keys/trust/README.md says who holds each and how it is replaced.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from importlib import resources
from typing import Final

PINNED: Final[Mapping[str, str]] = {
    "public-good": "6494e21ea73fa7ee769f85f57d5a3e6a08725eae1e38c755fc3517c9e6bc0b66",
    "staging": "81f5af777952d2c3955062ad56924c05ca916b5d49f3a0bce945faa475a8b1cc",
}


def public_root(*, staging: bool = False) -> bytes:
    """The bytes of trusted_root.json. AssertionError if the installed file is not the pinned one."""
    name = "staging" if staging else "public-good"
    raw = resources.files(__package__).joinpath("roots", f"{name}.trusted_root.json").read_bytes()
    assert hashlib.sha256(raw).hexdigest() == PINNED[name], f"{name}.trusted_root.json is not the pinned one"
    return raw

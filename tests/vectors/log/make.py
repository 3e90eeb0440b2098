"""Makes the vectors here with `tlog-scales`, another implementation of the C2SP formats; keys are thrown away.

usage: python -m tests.vectors.log.make
"""

from __future__ import annotations

import time
from pathlib import Path
from unittest import mock

from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA44PrivateKey
from tlog_scales import signing
from tlog_scales.tlog import Checkpoint

AT_S = 1795402800  # 2026-11-23
BODY = "pointcall.dev/log/vector\n300\n" + "q6urq6urq6urq6urq6urq6urq6urq6urq6urq6urq6s=" + "\n"


def main() -> None:
    signer = signing.MLDSA44CosignatureSigner("witness.example/pq", MLDSA44PrivateKey.generate())
    dummy = "\u2014 pointcall.dev/log/vector AAAAAAE=\n"
    with mock.patch.object(time, "time", return_value=AT_S):
        line = signer.sign(Checkpoint.from_text(f"{BODY}\n{dummy}")).serialize()
    text = f"key: {signer.vkey.serialize()}\n\n{BODY}\n{dummy}{line}\n"
    (Path(__file__).parent / "ml-dsa-44-cosigned.txt").write_text(text)


if __name__ == "__main__":
    main()

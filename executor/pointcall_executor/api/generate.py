"""Make the message classes of `pointcall.proto`: `python -m pointcall_executor.api.generate`.

Not part of a running executor: it needs grpcio-tools, an extra of developers. The result lies in `generated/`, which
git ignores and the wheel carries. Only messages are made; methods are dispatched by the table of roles.py.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

_HERE = Path(__file__).parent
_PACKAGE = "pointcall_executor/api/generated"  # the path inside the descriptor, so that imports are absolute


def generate(source: Path = _HERE / "pointcall.proto", out: Path = _HERE / "generated") -> None:
    """Write `<out>/pointcall_pb2.py` and its type stub. RuntimeError when protoc refuses the source."""
    protoc = importlib.import_module("grpc_tools.protoc")
    out.mkdir(exist_ok=True)
    (out / "__init__.py").write_text('"""Made by `python -m pointcall_executor.api.generate`; do not edit."""\n')
    root = out.parents[2]
    words = ["protoc", f"-I{_PACKAGE}={source.parent}", f"--python_out={root}", f"--pyi_out={root}"]
    if protoc.main([*words, f"{_PACKAGE}/{source.name}"]):
        raise RuntimeError(f"protoc refused {source}")


if __name__ == "__main__":
    generate()
    sys.stdout.write(f"made {_HERE / 'generated'}\n")

"""Build step: a `bpftool gen skeleton -L` header and the object's symbol table -> one blob file.

The header is read as text; nothing of it is compiled or executed. Not for run time: that is kernel/loader.py.
Spec: docs/spec/kernel-abi.md section 1 (the blob), bpftool 7.1 (the header's form).

usage: skeleton.py NAME NAME.skel.h NAME.syms OUT.blob
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from pointcall_executor.kernel.blob import Blob, Constant, Program

SIZES = {"__u8": 1, "__u16": 2, "__u32": 4, "__u64": 8, "char": 1}
ESCAPES = {"0": 0, "n": 10, "t": 9, "r": 13, "a": 7, "b": 8, "f": 12, "v": 11, "\\": 92, '"': 34, "'": 39}


def main(name: str, header_path: str, symbols_path: str, out: str) -> None:
    header = Path(header_path).read_text()
    sections = dict(_sections(Path(symbols_path).read_text()))
    initial, constants = _constants(header)
    blob = Blob(
        name=name,
        maps=_members(header, "bpf_map_desc", "maps"),
        programs=tuple(Program(p, sections[p]) for p in _members(header, "bpf_prog_desc", "progs")),
        initial=initial,
        constants=constants,
        data=_literal(header, "data"),
        insns=_literal(header, "insns"),
    )
    raw = blob.encode()
    assert Blob.parse(raw) == blob
    Path(out).write_bytes(raw)


def _sections(symbols: str) -> list[tuple[str, str]]:
    """(program, ELF section) of every global function."""
    return [(name, section) for section, name in re.findall(r" g +F (\S+)\s+[0-9a-f]+ (\w+)", symbols)]


def _members(header: str, kind: str, group: str) -> tuple[str, ...]:
    block = re.search(rf"\tstruct \{{((?:\s*struct {kind} \w+;)+)\s*\}} {group};", header)
    if block is None:
        raise SystemExit(f"the header has no {group}")
    return tuple(re.findall(rf"struct {kind} (\w+);", block[1]))


def _literal(header: str, what: str) -> bytes:
    found = re.search(rf'opts\.{what} = \(void \*\)"(.*?)";', header, re.DOTALL)
    size = re.search(rf"opts\.{what}_sz = (\d+)", header)
    if found is None or size is None:
        raise SystemExit(f"the header has no {what}")
    value = _c_string(found[1])
    if len(value) != int(size[1]):
        raise SystemExit(f"{what}: {len(value)} bytes, the header says {size[1]}")
    return value


def _c_string(text: str) -> bytes:
    r"""The bytes of a C string as bpftool writes it: \xHH, \0, \n and friends, line continuations."""
    out, at = bytearray(), 0
    text = text.replace("\\\n", "")
    while at < len(text):
        if text[at] != "\\":
            out += text[at].encode("latin-1")
            at += 1
        elif text[at + 1] == "x":
            out.append(int(text[at + 2 : at + 4], 16))
            at += 4
        else:
            out.append(ESCAPES[text[at + 1]])
            at += 2
    return bytes(out)


def _constants(header: str) -> tuple[bytes, tuple[Constant, ...]]:
    block = re.search(r"\tstruct \w+__rodata \{(.*?)\n\t\} \*rodata;", header, re.DOTALL)
    image = re.search(r'skel->rodata = skel_prep_map_data\(\(void \*\)"(.*?)", \d+, (\d+)\)', header, re.DOTALL)
    if block is None or image is None:
        return b"", ()
    at, found = 0, []
    for ctype, name, count in re.findall(r"(\w+) (\w+)(?:\[(\d+)\])?;", block[1]):
        size = SIZES[ctype]
        at += -at % size
        if not name.startswith("__pad"):
            found.append(Constant(name, at, size))
        at += size * int(count or 1)
    return _c_string(image[1]).ljust(int(image[2]), b"\0"), tuple(found)


if __name__ == "__main__":
    main(*sys.argv[1:5])

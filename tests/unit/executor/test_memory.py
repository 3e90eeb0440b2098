"""What is given back is really given back, and everything goes on as before."""

from __future__ import annotations

import ctypes
import re
import sqlite3
from pathlib import Path

import pytest

from pointcall_executor.memory import Code, forget_code, give_back, mapped_code

BLOCK = 64 * 1024  # below the size from which glibc maps each block on its own
HEAD = "7f0000001000-7f0000003000 {mode} 00001000 08:01 {inode}   /usr/lib/{name}\n"
BODY = "Size:       8 kB\nRss:        4 kB\nPrivate_Dirty:   {dirty} kB\nAnonymous:   {dirty} kB\n"


def smaps(mode: str = "r-xp", inode: int = 7, name: str = "libfoo.so.3", dirty: int = 0) -> str:
    return HEAD.format(mode=mode, inode=inode, name=name) + BODY.format(dirty=dirty) + "VmFlags: rd ex mr mw me sd\n"


def anonymous_kib() -> int:
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1])


def test_clean_code_of_a_named_library_is_found() -> None:
    text = smaps(name="other.so") + smaps() + smaps(name="with space.so")
    assert mapped_code(text, ("libfoo.",)) == [Code(0x7F0000001000, 0x2000, 4096)]
    assert len(mapped_code(text, ("with space",))) == 1


@pytest.mark.parametrize(
    "text",
    [
        smaps(mode="rw-p"),
        smaps(mode="r--p"),  # relocations may have been written to it
        smaps(mode="rwxp"),
        smaps(mode="r-xs"),
        smaps(dirty=4),  # somebody's breakpoint
        smaps(inode=0),  # what was made at run time exists nowhere else
        smaps(name="libfoobar.so.3"),
        smaps().replace("Private_Dirty", "Something"),  # a kernel that does not say so
        smaps().replace("Anonymous", "Something"),
        smaps()[: len(HEAD) // 2],
        "",
    ],
)
def test_everything_else_is_left_alone(text: str) -> None:
    assert mapped_code(text, ("libfoo.",)) == []


def test_forgotten_code_still_runs() -> None:
    with sqlite3.connect(":memory:") as db:
        before = db.execute("select sum(value), hex(sha) from (select 7 as value, 'x' as sha)").fetchall()
        if not mapped_code(Path("/proc/self/smaps").read_text(), ("libsqlite3.", "_sqlite3.")):
            pytest.skip("SQLite is not a shared library here")
        assert forget_code(("libsqlite3.", "_sqlite3.")) > 0
        assert forget_code(("libsqlite3.", "_sqlite3.")) == 0
        assert db.execute("select sum(value), hex(sha) from (select 7 as value, 'x' as sha)").fetchall() == before
    assert forget_code(("no such library",)) == 0


def test_free_heap_goes_back() -> None:
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_trim"):
        pytest.skip("this C library has no malloc_trim")
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    blocks = [libc.malloc(BLOCK) for _ in range(512)]
    keep = libc.malloc(BLOCK)  # above all the others: without a trim nothing below it is returned
    for block in blocks:
        ctypes.memset(block, 1, BLOCK)
        libc.free(block)
    held = anonymous_kib()
    assert give_back()
    assert held - anonymous_kib() > 512 * BLOCK // 1024 // 2
    libc.free(keep)

"""The tree against RFC 6962 written out plainly, pymerkle and tlog-scales; every proof, and every wrong proof."""

from __future__ import annotations

import hashlib
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pymerkle import InmemoryTree
from tlog_scales.tlog import ConsistencyProof, InclusionProof

from pointcall_attest.log.tree import (
    EMPTY_ROOT,
    Tree,
    leaf_hash,
    node_hash,
    verify_consistency,
    verify_inclusion,
)

LEAVES = [leaf_hash(b"%d" % i) for i in range(70_000)]
BIG = Tree(LEAVES)


def mth(leaves: list[bytes]) -> bytes:
    """RFC 6962 section 2.1, word by word."""
    if not leaves:
        return hashlib.sha256(b"").digest()
    if len(leaves) == 1:
        return leaves[0]
    k = 1
    while k * 2 < len(leaves):
        k *= 2
    return node_hash(mth(leaves[:k]), mth(leaves[k:]))


@pytest.mark.parametrize("size", [*range(40), 255, 256, 257, 511, 513, 1000])
def test_root_equals_the_definition(size: int) -> None:
    assert Tree(LEAVES[:size]).root() == mth(LEAVES[:size]) == BIG.root(size)


def test_the_empty_tree() -> None:
    assert Tree().root() == EMPTY_ROOT
    with pytest.raises(IndexError):
        Tree().inclusion(0)


def test_pymerkle_has_the_same_root() -> None:
    theirs = InmemoryTree(algorithm="sha256")
    for i in range(1000):
        theirs.append_entry(b"%d" % i)
    assert theirs.get_root() == BIG.root(1000)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_inclusion_proofs_verify_here_and_in_tlog_scales(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, len(LEAVES)))
    index = data.draw(st.integers(0, size - 1))
    path = BIG.inclusion(index, size)
    assert verify_inclusion(index, size, LEAVES[index], path, BIG.root(size))
    InclusionProof(index, size, path).check(LEAVES[index], BIG.root(size))


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_consistency_proofs_verify_here_and_in_tlog_scales(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, len(LEAVES)))
    old = data.draw(st.integers(1, size))
    path = BIG.consistency(old, size)
    assert verify_consistency(old, size, BIG.root(old), BIG.root(size), path)
    ConsistencyProof(old, size, path).check(BIG.root(old), BIG.root(size))


def test_all_small_proofs_and_no_wrong_ones() -> None:
    for size in range(1, 18):
        root = BIG.root(size)
        for index in range(size):
            path = BIG.inclusion(index, size)
            places = [i for i in range(-1, size + 1) if verify_inclusion(i, size, LEAVES[index], path, root)]
            assert places == [index]
            assert not verify_inclusion(index, size, LEAVES[index + 1], path, root)
        for old in range(1, size):
            path = BIG.consistency(old, size)
            olds = [o for o in range(-1, size + 1) if verify_consistency(o, size, BIG.root(old), root, path)]
            assert olds == [old]


@given(st.integers(1, 3000), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_a_changed_proof_does_not_verify(size: int, chance: random.Random) -> None:
    index = chance.randrange(size)
    path, root = BIG.inclusion(index, size), BIG.root(size)
    for wrong in _mutations(path, chance):
        assert not verify_inclusion(index, size, LEAVES[index], wrong, root)
    old = chance.randrange(1, size + 1)
    path = BIG.consistency(old, size)
    for wrong in _mutations(path, chance):
        assert not verify_consistency(old, size, BIG.root(old), root, wrong)


def _mutations(path: list[bytes], chance: random.Random) -> list[list[bytes]]:
    out = [[*path, LEAVES[0]], [LEAVES[0], *path]]
    if path:
        at = chance.randrange(len(path))
        flipped = bytes([path[at][0] ^ 1]) + path[at][1:]
        out += [path[:-1], path[1:], [*path[:at], flipped, *path[at + 1 :]]]
    return out


def test_a_fork_is_no_growth() -> None:
    forked = Tree([*LEAVES[:500], leaf_hash(b"forged"), *LEAVES[501:2000]])
    path = forked.consistency(1000, 2000)
    assert not verify_consistency(1000, 2000, BIG.root(1000), forked.root(2000), path)
    assert not verify_consistency(1000, 1000, BIG.root(1000), forked.root(1000), [])


def test_growth_from_nothing() -> None:
    assert verify_consistency(0, 5, EMPTY_ROOT, BIG.root(5), [])
    assert not verify_consistency(0, 5, BIG.root(1), BIG.root(5), [])
    assert not verify_consistency(0, 5, EMPTY_ROOT, BIG.root(5), [LEAVES[0]])
    assert BIG.consistency(0, 5) == []


@pytest.mark.parametrize("call", [lambda: BIG.root(70_001), lambda: BIG.leaf(70_000), lambda: BIG.inclusion(5, 5)])
def test_beyond_the_end(call: object) -> None:
    with pytest.raises(IndexError):
        call()  # type: ignore[operator]


def test_a_long_path_is_not_walked() -> None:
    assert not verify_inclusion(0, 2**62, LEAVES[0], [LEAVES[0]] * 1000, LEAVES[0])
    assert not verify_consistency(1, 2**62, LEAVES[0], LEAVES[0], [LEAVES[0]] * 1000)

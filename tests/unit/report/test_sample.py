"""Samples: fixed by seed and root, from the whole population, and a little change of either draws another."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pointcall_attest.report.sample import draw

ROOT = bytes(range(32))
populations = st.sets(st.integers(0, 2**63), max_size=80)


def test_the_draw_is_fixed_for_ever() -> None:
    assert draw(range(100), n=5, seed="auditor 2026-11", root=ROOT) == (0, 35, 47, 63, 80)


@given(populations, st.integers(1, 40), st.text(st.characters(codec="utf-8"), min_size=1, max_size=40))
def test_it_is_a_sample(population: set[int], n: int, seed: str) -> None:
    drawn = draw(population, n=n, seed=seed, root=ROOT)
    assert len(drawn) == min(n, len(population))
    assert set(drawn) <= population
    assert list(drawn) == sorted(set(drawn))
    assert draw(sorted(population, reverse=True), n=n, seed=seed, root=ROOT) == drawn


@given(populations, st.integers(1, 20))
def test_a_larger_sample_has_the_smaller_one_in_it(population: set[int], n: int) -> None:
    assert set(draw(population, n=n, seed="s", root=ROOT)) <= set(draw(population, n=n + 5, seed="s", root=ROOT))


def test_seed_and_root_both_decide() -> None:
    first = draw(range(1000), n=20, seed="a", root=ROOT)
    assert draw(range(1000), n=20, seed="b", root=ROOT) != first
    assert draw(range(1000), n=20, seed="a", root=ROOT[::-1]) != first


def test_every_run_can_be_drawn() -> None:
    seen = {i for seed in range(200) for i in draw(range(20), n=2, seed=str(seed), root=ROOT)}
    assert seen == set(range(20))

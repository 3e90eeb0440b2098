"""Deterministic simulation: the real executor on a simulated clock, disk, kernel, services and network, from one seed.

`python -m tests.sim --seed N --events M` repeats one run exactly. What is real and what is simulated:
docs/spec/simulation.md.
"""

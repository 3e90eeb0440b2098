"""The one form of a benchmark's output: one JSON object a figure."""

from __future__ import annotations

import json
from collections.abc import Sequence


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def figure(
    suite: str,
    metric: str,
    value: float,
    unit: str,
    n: int,
    *,
    baseline: str = "",
    ratio: float | None = None,
    peer: str | None = None,
) -> None:
    """Print one figure. `ratio` is value over baseline of the same run."""
    row = {"suite": suite, "metric": metric, "value": round(value, 3), "unit": unit, "n": n, "baseline": baseline}
    print(json.dumps(row | {"ratio": None if ratio is None else round(ratio, 3), "peer": peer}), flush=True)

"""Median and quartiles of repeated measurements: on a machine with other work a mean says little."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Of some values; of a single one all three are that.

        Example:
            >>> Spread.of([1.0, 2.0, 3.0, 4.0, 5.0])
            Spread(median=3.0, low=2.0, high=4.0)
        """
        found = list(values)
        low, median, high = statistics.quantiles(found if len(found) > 1 else found * 2, n=4, method="inclusive")
        return cls(median, low, high)

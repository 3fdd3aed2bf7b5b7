"""Stands for a mask whose processor asks the device, in each layer and of each sample, which tokens count.

Mochi's takes `torch.nonzero` of it, which has to wait for the device. What was read of the mask at the transformer's
input tells it as well: those are the first tokens, so many of each sample. A slice of them is a view where indices make
a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class KnownPlaces:
    """Goes the way of a mask `[B, L]`, and gives slices in the place of indices.

    Args:
        counts: How many tokens count, of each sample.
    """

    def __init__(self, counts: Sequence[int]) -> None:
        self._samples = [_OfSample(slice(0, count)) for count in counts]

    def __getitem__(self, sample: int) -> _OfSample:
        return self._samples[sample]


class _OfSample:
    """The mask of one sample, in any shape."""

    def __init__(self, places: slice) -> None:
        self._places = _Places(places)

    def __getitem__(self, _: Any) -> _OfSample:
        return self

    def flatten(self) -> _OfSample:
        """Itself."""
        return self

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> _Places:
        """`torch.nonzero`, the only function of PyTorch that it is given to."""
        sample: _OfSample = args[0]
        return sample._places


class _Places:
    """What `torch.nonzero` gives of it."""

    def __init__(self, places: slice) -> None:
        self._places = places

    def flatten(self) -> slice:
        """The places."""
        return self._places

"""The last computed residuals of one branch, kept as the newest one and the differences between neighbours.

Differences are kept, and not the older residuals themselves, for accuracy: in half precision the sum
`4·r0 - 3·r1` of two large tensors loses what `r0 + 3·(r0 - r1)` keeps. It takes the same memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from torch import Tensor

_ROUNDING = 1e-6  # weights that sum to 1 this nearly are meant to: nothing is multiplied

Residuals = tuple["Tensor | None", ...]
"""One residual for each stream of each block list, `[B, T, C]` as the model has them; None for an unchanged stream."""


class History:
    """Residuals of the computed steps, newest first.

    Args:
        depth: How many computed steps to keep; predictors of order n need n + 1.
    """

    def __init__(self, depth: int) -> None:
        self._depth = depth
        self.times: tuple[float, ...] = ()
        self._newest: Residuals = ()
        self._differences: tuple[Residuals, ...] = ()

    def __len__(self) -> int:
        return len(self.times)

    def append(self, time: float, residuals: Residuals) -> None:
        """Adds the residuals of a computed step.

        Args:
            time: When it was, in the clock that the predictor uses (steps or sigma).
            residuals: Newly made tensors, which the history now owns.
        """
        if self.times and self._depth > 1:
            difference = tuple(
                None if new is None or old is None else new - old
                for new, old in zip(residuals, self._newest, strict=True)
            )
            self._differences = (difference, *self._differences)[: self._depth - 1]
        self._newest = residuals
        self.times = (time, *self.times)[: self._depth]

    def drop_oldest(self) -> None:
        """Forgets the oldest step that is kept."""
        self.times = self.times[:-1]
        self._differences = self._differences[: max(len(self.times) - 1, 0)]

    def keep_newest(self) -> None:
        """Forgets all steps but the newest."""
        self.times, self._differences = self.times[:1], ()

    def combine(self, index: int, weights: Sequence[float]) -> Tensor | None:
        """Returns the weighted sum of the kept residuals of one stream.

        Args:
            index: Which stream.
            weights: One weight for each of the newest steps.

        Returns:
            Σ weights[i] · residual[i], of the residuals' dtype; None for an unchanged stream. It may be a kept tensor
            itself and must not be written to.
        """
        total = self._newest[index]
        if total is None:
            return None
        # With r_i = r_0 - d_1 - … - d_i the weight of d_i is minus the sum of the weights from i on.
        whole = sum(weights)
        if abs(whole - 1) > _ROUNDING:
            total = total * whole
        tails = list(accumulate(reversed(weights[1:])))[::-1]
        for tail, difference in zip(tails, self._differences, strict=False):
            step = difference[index]
            if step is not None and tail:
                total = total.add(step, alpha=-tail)
        return total

    def nbytes(self) -> int:
        """Bytes of the tensors that are kept."""
        kept = (*self._newest, *(tensor for step in self._differences for tensor in step))
        return sum(tensor.numel() * tensor.element_size() for tensor in kept if tensor is not None)

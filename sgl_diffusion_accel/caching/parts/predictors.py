"""What the skipped blocks would have added, guessed from what they added at computed steps.

Every predictor is a set of weights on the residuals of the last computed steps, found from their times alone.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import final

from sgl_diffusion_accel.validate import count


class Predictor(ABC):
    """Predicts the residual of a span at a step that is not computed."""

    @property
    @abstractmethod
    def depth(self) -> int:
        """How many computed steps it can use."""

    @abstractmethod
    def weights(self, times: Sequence[float], target: float) -> tuple[float, ...]:
        """Weighs the last computed steps.

        Args:
            times: Times of the computed steps, newest first; at least one, at most `depth`.
            target: Time of the step to be predicted, in the same clock.

        Returns:
            One finite weight for each time. They sum to 1, or what is predicted is damped or amplified.
        """


@final
@dataclass(frozen=True)
class Reuse(Predictor):
    """The last computed residual, as it is."""

    @property
    def depth(self) -> int:
        """One computed step."""
        return 1

    def weights(self, times: Sequence[float], target: float) -> tuple[float, ...]:  # noqa: ARG002
        """All weight on the newest step."""
        return (1.0,) + (0.0,) * (len(times) - 1)


@final
@dataclass(frozen=True)
class Taylor(Predictor):
    """Taylor expansion around the last computed step.

    With k the time since then and F⁽ⁱ⁾ the i-th backward difference of the residual divided by the time between the
    computed steps, the prediction is Σ F⁽ⁱ⁾·kⁱ/i!. Until order + 1 steps are known it uses the order that they allow.

    Source: TaylorSeer, "From Reusing to Forecasting", https://arxiv.org/abs/2503.06923.

    Attributes:
        order: Highest derivative, at least 1.

    Example:
        >>> Taylor(1).weights([10.0, 8.0], 11.0)
        (1.5, -0.5)
    """

    order: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "order", count("order", self.order, 1))

    @property
    def depth(self) -> int:
        """One more computed step than the order."""
        return self.order + 1

    def weights(self, times: Sequence[float], target: float) -> tuple[float, ...]:
        """Expands the backward differences into weights on the residuals."""
        count = min(len(times), self.depth)
        # Two steps at one time (a scheduler may repeat a sigma) have no slope: only what is newer is used.
        count = next((i for i in range(1, count) if times[i] == times[i - 1]), count)
        # derivatives[j][i]: weight of the residual at times[i] in the current derivative at times[j]
        derivatives = [[float(i == j) for i in range(len(times))] for j in range(count)]
        result = list(derivatives[0])
        for order in range(1, count):
            derivatives = [
                [(a - b) / (times[j] - times[j + 1]) for a, b in zip(newer, older, strict=True)]
                for j, (newer, older) in enumerate(pairwise(derivatives))
            ]
            factor = (target - times[0]) ** order / math.factorial(order)
            result = [total + factor * weight for total, weight in zip(result, derivatives[0], strict=True)]
        return tuple(result)


def taylor(order: int) -> Predictor:
    """The prediction of an order; order 0 reuses the last residual."""
    return Taylor(order) if order else Reuse()

"""Records the magnitudes of what a transformer's blocks add, step by step of uncached runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sgl_diffusion_accel.caching.magcache.magnitudes import MagnitudeRatios
from sgl_diffusion_accel.caching.parts.signals import Reduce
from sgl_diffusion_accel.caching.parts.stats import RunStats


@dataclass
class MagnitudeRecorder:
    """Collects the magnitude ratios of one transformer. Of each branch it keeps one number a token.

    Attributes:
        reduction: Tells how ranks that share the tokens add up a small tensor, in place; None for a single rank.
        ratios: (number of the run, branch) to step to γ.
    """

    reduction: Callable[[], Reduce | None] | None = None
    ratios: dict[tuple[int, str], dict[int, float]] = field(default_factory=dict)
    _norms: dict[tuple[int, str], tuple[int, Tensor]] = field(default_factory=dict)

    def add(self, run: int, branch: str, step: int, residuals: Sequence[Tensor]) -> None:
        """Sees what the block lists have added to the hidden states, `[B, T, C]` each."""
        key, now = (run, branch), token_norms(residuals)
        before = self._norms.get(key)
        if before is not None and before[0] == step - 1 and before[1].shape == now.shape:
            ratio = _mean_ratio(now, before[1], self.reduction() if self.reduction is not None else None)
            if math.isfinite(ratio):
                self.ratios.setdefault(key, {})[step] = ratio
        self._norms = {each: kept for each, kept in self._norms.items() if each[0] >= run - 1}
        self._norms[key] = (step, now)

    def clear(self) -> None:
        """Forgets all runs."""
        self.ratios.clear()
        self._norms.clear()


def token_norms(residuals: Sequence[Tensor]) -> Tensor:
    """Magnitudes ‖r‖₂ of what all block lists together have added, for each token.

    Where lists see the same tokens, what they add is summed up. Where they do not (one takes picture and text, another
    the picture alone), each list's tokens count by themselves.

    Args:
        residuals: Of each list, `[B, T, C]`.

    Returns:
        One number for each token, flat, in float32.
    """
    sums: dict[torch.Size, Tensor] = {}
    for residual in residuals:
        sums[residual.shape] = sums[residual.shape] + residual if residual.shape in sums else residual
    return torch.cat([total.detach().float().norm(dim=-1).flatten() for total in sums.values()])


def ratios_of(run: RunStats, number: int, recorders: Mapping[str, MagnitudeRecorder]) -> MagnitudeRatios | None:
    """The ratios of one recorded run.

    Args:
        run: The run.
        number: Its number.
        recorders: Component name to what was recorded.

    Returns:
        The ratios, None where no branch has two steps in a row.
    """
    found: dict[str, dict[str, list[float | None]]] = {}
    for component, recorder in recorders.items():
        for branch in run.branches:
            known = recorder.ratios.get((number, branch))
            if known:
                found.setdefault(component, {})[branch] = [known.get(step) for step in range(run.steps)]
    return MagnitudeRatios(found) if found else None


def _mean_ratio(now: Tensor, before: Tensor, reduce: Reduce | None) -> float:
    """Mean of now / before; tokens without a magnitude (padding) do not count. Waits for the device."""
    counted = before > 0
    ratios = torch.where(counted, now / before, 0)
    sums = torch.stack((ratios.sum(), counted.sum(dtype=torch.float32)))
    if reduce is not None:
        reduce(sums)
    return float(sums[0] / sums[1])

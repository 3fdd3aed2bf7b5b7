"""Gives a transformer one timestep where it is given the same one for each token.

Wan2.2-TI2V-5B takes a timestep for each token, since in image to video those of the first frame stand at 0. In text to
video all are equal, and yet the modulation is made for each token: `[B, N, 6, C]` in float32, in each block.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor, nn

from sgl_diffusion_accel.lossless.arguments import Arguments
from sgl_diffusion_accel.lossless.both_ways import Verification
from sgl_diffusion_accel.lossless.call_handler import is_context_parallel
from sgl_diffusion_accel.lossless.padding.reading import Known
from sgl_diffusion_accel.slots import With
from sgl_diffusion_accel.targets import Target, model_class

TIMESTEP = "timestep"
"""The parameter, `[B, N]` or `[B]`."""

_PER_TOKEN = 2  # dimensions


class EqualTimesteps:
    """The timesteps of one transformer.

    Args:
        target: The transformer.
        verify: Makes the first call of each shape both ways, and raises where they differ; None verifies none.

    Attributes:
        reads: How often the device was asked: once a step, since each has timesteps of its own.
        seen: Calls, by what was found.
    """

    def __init__(self, target: Target, verify: Verification | None) -> None:
        self.reads = 0
        self.seen: Counter[str] = Counter()
        self._verify = verify
        model: Any = model_class(target.module)
        self._arguments = Arguments(model.forward)
        self._last: tuple[Known, bool] | None = None

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> With | None:
        """Begins a call, with one timestep for all tokens."""
        timestep = self._arguments.find((TIMESTEP,), args, kwargs).get(TIMESTEP)
        if not isinstance(timestep, Tensor) or timestep.ndim != _PER_TOKEN or is_context_parallel(module):
            self.seen["a timestep for each sample, as given"] += 1
            return None
        if not self._are_equal(timestep):
            self.seen[f"left alone: its {timestep.shape[1]:,} tokens have different timesteps"] += 1
            return None
        self.seen[f"{TIMESTEP} of each token {timestep.shape[1]:,} → 1: all equal"] += 1
        changed = self._arguments.change({TIMESTEP: timestep[:, 0]}, args, kwargs)
        if self._verify is not None:
            self._verify.same(module, (args, kwargs), changed, "with one timestep for all tokens")
        return With(*changed)

    def _are_equal(self, timestep: Tensor) -> bool:
        last = self._last  # cond and uncond are given the same one
        if last is not None and last[0].is_still(timestep):
            return last[1]
        self.reads += 1
        equal = bool((timestep == timestep[:, :1]).all())
        self._last = None if timestep.is_inference() else (Known(timestep), equal)
        return equal

    def leave(self, _: None, output: Any) -> Any:
        """Nothing: the output is as it was."""
        return output

    def fail(self, _: None) -> None:
        """Nothing."""

    def lines(self) -> list[str]:
        """What was found."""
        return [f"{count} calls: {told}" for told, count in self.seen.most_common()] or ["no call yet"]

    def line(self) -> str:
        """What was found most often."""
        common = self.seen.most_common(1)
        return common[0][0] if common else "no call yet"

    def forget(self) -> None:
        """Forgets the timestep that was read."""
        self._last = None

"""Step computation masks: which denoising steps are computed, laid down beforehand."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sgl_diffusion_accel.errors import ConfigError, ConfigTypeError, unknown_name

Bins = tuple[tuple[int, ...], tuple[int, ...]]
"""Lengths of the stretches of computed and of skipped steps, which alternate, computed first."""

# The presets of SGLang-Diffusion and cache-dit, at the step counts for which they state them.
_SHAPE = 28
_BINS: dict[int, dict[str, Bins]] = {
    28: {
        "slow": ((8, 3, 3, 2, 1, 1), (1, 2, 2, 2, 3)),
        "medium": ((6, 2, 2, 2, 2, 1), (1, 3, 3, 3, 3)),
        "fast": ((6, 1, 1, 1, 1, 1), (1, 3, 4, 5, 4)),
        "ultra": ((4, 1, 1, 1, 1), (2, 5, 6, 7)),
    },
    50: {
        "slow": ((22, 5, 5, 3, 2, 1), (2, 3, 3, 3, 1)),
        "medium": ((16, 3, 3, 3, 3, 1), (2, 5, 5, 5, 4)),
        "fast": ((11, 2, 2, 2, 2, 1), (2, 5, 7, 9, 7)),
        "ultra": ((7, 2, 2, 2, 1), (3, 9, 11, 13)),
    },
    9: {
        "slow": ((5, 3), (1,)),
        "medium": ((5, 1, 1), (1, 1)),
        "fast": ((4, 1, 1), (1, 2)),
        "ultra": ((3, 1, 1), (2, 2)),
    },
    8: {
        "slow": ((5, 2), (1,)),
        "medium": ((4, 1, 1), (1, 1)),
        "fast": ((3, 1, 1), (1, 2)),
        "ultra": ((2, 1, 1), (2, 2)),
    },
}
_FEW: dict[int, str] = {1: "1", 2: "11", 3: "111", 4: "1101", 5: "11011", 6: "111001", 7: "1110101"}
PRESETS = tuple(_BINS[_SHAPE])
"""Names of the preset masks, from the mildest to the boldest."""


@dataclass(frozen=True)
class StepsMask:
    """Which denoising steps are computed (1) and which are, or may be, skipped (0).

    Attributes:
        compute_bins: Lengths of the stretches of computed steps.
        cache_bins: Lengths of the stretches of skipped steps between them; as many, or one fewer.

    Raises:
        ConfigError: The bins do not alternate, or one of them is not positive.

    Example:
        >>> StepsMask([4, 2, 1], [3, 2]).resolve(12)
        (1, 1, 1, 1, 0, 0, 0, 1, 1, 0, 0, 1)
    """

    compute_bins: Sequence[int] = ()
    cache_bins: Sequence[int] = ()
    _steps: tuple[int, ...] = field(default=(), repr=False)
    _preset: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "compute_bins", _lengths("compute_bins", self.compute_bins))
        object.__setattr__(self, "cache_bins", _lengths("cache_bins", self.cache_bins))
        if self._preset or self._steps:
            return
        if not self.compute_bins or len(self.compute_bins) - len(self.cache_bins) not in (0, 1):
            raise ConfigError(
                f"compute_bins={list(self.compute_bins)} and cache_bins={list(self.cache_bins)} do not alternate: "
                "cache_bins needs as many entries as compute_bins, or one fewer. Type: StepsMask([8, 3, 2], [2, 2])."
            )
        object.__setattr__(self, "_steps", _alternate(self.compute_bins, self.cache_bins))

    @classmethod
    def preset(cls, name: str) -> StepsMask:
        """Returns a preset by name, which fits any number of steps.

        Args:
            name: `"slow"`, `"medium"`, `"fast"` or `"ultra"`: about 70, 55, 40 and 28 % of the steps computed.

        Raises:
            ConfigError: There is no preset of that name.
        """
        if name not in PRESETS:
            raise unknown_name("steps_mask preset", name, PRESETS)
        return cls(_preset=name)

    @classmethod
    def of(cls, mask: str | Sequence[int] | StepsMask) -> StepsMask:
        """Makes a mask of a preset's name, a list of 0 and 1, or a mask.

        Raises:
            ConfigError: Unknown name, entries other than 0 and 1, or a first entry of 0.
            ConfigTypeError: Anything else.
        """
        if isinstance(mask, StepsMask):
            return mask
        if isinstance(mask, str):
            return cls.preset(mask)
        if not isinstance(mask, Sequence):
            raise ConfigTypeError(
                f"steps_mask is a {type(mask).__name__}; allowed: one of {', '.join(PRESETS)}, a list of 0 and 1, "
                "or StepsMask(compute_bins, cache_bins)."
            )
        wrong = [entry for entry in mask if isinstance(entry, (str, float)) or entry not in (0, 1)]
        if wrong or not mask:
            raise ConfigError(
                f"steps_mask must be a list of 0 and 1, got {wrong[0]!r} in it" if wrong else "empty mask"
            )
        if not mask[0]:
            raise ConfigError(
                "steps_mask starts with 0, but at the first step there is nothing to reuse. Start with 1."
            )
        return cls(_steps=tuple(int(entry) for entry in mask))

    def resolve(self, total: int) -> tuple[int, ...]:
        """Returns the mask for a run.

        Args:
            total: Number of denoising steps of the run.

        Raises:
            ConfigError: The mask has another number of entries.
        """
        if self._preset:
            return _preset_steps(self._preset, total)
        if len(self._steps) != total:
            raise ConfigError(
                f"the steps_mask has {len(self._steps)} entries, but this run has {total} denoising steps. Give a mask "
                f"of {total} entries, or a preset, which fits any number: steps_mask='medium'."
            )
        return self._steps

    def __str__(self) -> str:
        return self._preset or "".join(map(str, self._steps))


def _lengths(name: str, bins: Any) -> tuple[int, ...]:
    if not isinstance(bins, (list, tuple)) or any(not isinstance(length, int) or length < 1 for length in bins):
        raise ConfigError(f"{name}={bins!r}: allowed are whole numbers of 1 and more, such as [8, 3, 2].")
    return tuple(bins)


def _alternate(compute_bins: Sequence[int], cache_bins: Sequence[int]) -> tuple[int, ...]:
    steps: list[int] = []
    for index, length in enumerate(compute_bins):
        steps += [1] * length
        if index < len(cache_bins):
            steps += [0] * cache_bins[index]
    return tuple(steps)


@functools.lru_cache(maxsize=256)
def _preset_steps(name: str, total: int) -> tuple[int, ...]:
    """The preset's own mask where the peers state one, else the shape of 28 steps, stretched.

    Below 8 steps all presets are the same mild mask, and up to 3 steps everything is computed.
    """
    if total in _FEW:
        return tuple(int(step) for step in _FEW[total])
    if total in _BINS:
        return _alternate(*_BINS[total][name])
    shape = _alternate(*_BINS[_SHAPE][name])
    steps = [shape[step * _SHAPE // total] for step in range(total)]
    steps[-1] = 1
    return tuple(steps)

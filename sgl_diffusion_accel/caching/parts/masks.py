"""Step computation masks: which denoising steps are computed, laid down beforehand."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sgl_diffusion_accel.caching.parts.mask_presets import PRESETS, alternate, late_steps, preset_steps
from sgl_diffusion_accel.errors import ConfigError, ConfigTypeError, unknown_name
from sgl_diffusion_accel.validate import is_number


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

    compute_bins: Sequence[int] = field(default=(), compare=False)
    cache_bins: Sequence[int] = field(default=(), compare=False)
    _steps: tuple[int, ...] = field(default=(), repr=False)
    _preset: str = field(default="", repr=False)
    _share: float = field(default=0.0, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "compute_bins", _lengths("compute_bins", self.compute_bins))
        object.__setattr__(self, "cache_bins", _lengths("cache_bins", self.cache_bins))
        if self._preset or self._steps or self._share:
            return
        if not self.compute_bins or len(self.compute_bins) - len(self.cache_bins) not in (0, 1):
            raise ConfigError(
                f"compute_bins={list(self.compute_bins)} and cache_bins={list(self.cache_bins)} do not alternate: "
                "cache_bins needs as many entries as compute_bins, or one fewer. Type: StepsMask([8, 3, 2], [2, 2])."
            )
        object.__setattr__(self, "_steps", alternate(self.compute_bins, self.cache_bins))

    @classmethod
    def preset(cls, name: str) -> StepsMask:
        """Returns a preset by name, which fits any number of steps.

        `"slow"`, `"medium"`, `"fast"` and `"ultra"` are SGLang-Diffusion's. They compute many steps at the start and
        few at the end, and as static masks they lose to simply running fewer steps on the models measured.
        `"late-slow"`, `"late-medium"`, `"late-fast"` and `"late-ultra"` compute as many steps, ever more densely
        towards the end; with `steps_policy="static"` and `taylorseer_order=2` they do not lose to it.

        Args:
            name: One of these; about 70, 54, 40 and 28 % of the steps are computed.

        Raises:
            ConfigError: There is no preset of that name.
        """
        if name not in PRESETS:
            raise unknown_name("steps_mask preset", name, PRESETS)
        return cls(_preset=name)

    @property
    def is_late(self) -> bool:
        """Whether it is one of those that compute ever more densely towards the end."""
        return bool(self._share) or self._preset.startswith("late-")

    @classmethod
    def late(cls, share: Any) -> StepsMask:
        """Returns a mask that computes a share of the steps, the first three and then ever more densely to the end.

        Below 8 steps it is the one mild mask that all presets share.

        Args:
            share: Share of the steps to compute, between 0 and 1.

        Raises:
            ConfigError: The share is not between 0 and 1.

        Example:
            >>> StepsMask.late(0.5).resolve(12)
            (1, 1, 1, 0, 0, 0, 1, 0, 0, 1, 0, 1)
        """
        if not is_number(share) or not 0 < share <= 1:
            raise ConfigError(f"share={share!r}; allowed: a number above 0 and up to 1, such as 0.34.")
        return cls(_share=float(share))

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
        if hasattr(mask, "tolist"):  # an array or a tensor
            mask = mask.tolist()
        if not isinstance(mask, Sequence) or isinstance(mask, bytes):
            raise ConfigTypeError(
                f"steps_mask is a {type(mask).__name__}; allowed: one of {', '.join(PRESETS)}, a list of 0 and 1, "
                "or StepsMask(compute_bins, cache_bins)."
            )
        wrong = [entry for entry in mask if not isinstance(entry, (int, numbers.Integral)) or entry not in (0, 1)]
        if wrong or not mask:
            seen = f"has the entry {wrong[0]!r}" if wrong else "is empty"
            raise ConfigError(f"steps_mask {seen}; allowed: a list of 0 and 1, one for each denoising step.")
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
            return preset_steps(self._preset, total)
        if self._share:
            return late_steps(self._share, total)
        if len(self._steps) != total:
            raise ConfigError(
                f"the steps_mask has {len(self._steps)} entries, but this run has {total} denoising steps. Give a mask "
                f"of {total} entries, or a preset, which fits any number: steps_mask='medium'."
            )
        return self._steps

    def __str__(self) -> str:
        return self._preset or (f"late({self._share:g})" if self._share else "".join(map(str, self._steps)))

    def __repr__(self) -> str:
        if self._preset:
            return f"StepsMask.preset({self._preset!r})"
        if self._share:
            return f"StepsMask.late({self._share:g})"
        return f"StepsMask.of({list(self._steps)})"


def _lengths(name: str, bins: Any) -> tuple[int, ...]:
    whole = isinstance(bins, (list, tuple)) and all(isinstance(length, numbers.Integral) for length in bins)
    if not whole or any(length < 1 for length in bins):
        raise ConfigError(f"{name}={bins!r}: allowed are whole numbers of 1 and more, such as [8, 3, 2].")
    return tuple(int(length) for length in bins)

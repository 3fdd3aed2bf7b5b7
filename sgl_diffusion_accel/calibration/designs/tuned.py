"""Designs that are foreseen to be about as good as each other, to be tried on the pipeline itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from sgl_diffusion_accel.calibration.designs.design import Design, DesignSettings, Moments, as_foreseen
from sgl_diffusion_accel.calibration.designs.design_search import best_design
from sgl_diffusion_accel.errors import ConfigError
from sgl_diffusion_accel.validate import count, finite, of_type

USUAL = "usual"
"""The design of a plan that nothing was tried for."""

_CHANGES: dict[str, dict[str, Any]] = {
    USUAL: {},
    "new directions": {"fresh": 1.0},
    "little across": {"across": 0.3, "along": 0.0, "fresh": 1.0},
    "across twice": {"across": 2.0},
    "old directions": {"fresh": 0.3},
    "none along": {"along": 0.0},
    "all along": {"along": 1.0},
    "across half": {"across": 0.5},
}
_RIDGE = {"stiff": 3.0, "loose": 1 / 3}  # times the usual one

NAMES = (*_CHANGES, *_RIDGE)
"""What differs from the usual design, in the order in which they are tried."""


@dataclass(frozen=True)
class Tuned:
    """Which design is the best of those tried for a number of computed steps, see `tune_plan`.

    Attributes:
        computed_steps: Steps computed.
        design: Its name, one of `NAMES`.
        gain: How many times as far off runs by the usual design were, the geometric mean over the calls that both were
            tried on; from 1.
        calls: On how many calls the best one was tried.

    Raises:
        ConfigError: No steps or no calls, an unknown name, or a gain under 1.
        ConfigTypeError: Something has a wrong type.
    """

    computed_steps: int
    design: str
    gain: float
    calls: int

    def __post_init__(self) -> None:
        for name in ("computed_steps", "calls"):
            object.__setattr__(self, name, count(name, getattr(self, name), 1))
        if of_type("design", self.design, str, f"one of {', '.join(NAMES)}") not in NAMES:
            raise ConfigError(f"design={self.design!r}; allowed: {', '.join(NAMES)}.")
        gain = finite("gain", self.gain, "a number from 1")
        if gain < 1:
            raise ConfigError(f"gain={gain:g}; allowed: a number from 1.")
        object.__setattr__(self, "gain", gain)

    def __str__(self) -> str:
        return "the usual design is the best" if self.design == USUAL else f"{self.gain:.1f} times closer"


def settings_named(name: str, moments: Moments) -> DesignSettings:
    """The settings of a design that is tried.

    Args:
        name: One of `NAMES`.
        moments: Of the runs.
    """
    usual = DesignSettings.of(moments)
    return replace(usual, ridge=usual.ridge * _RIDGE.get(name, 1.0), **_CHANGES.get(name, {}))


def design_named(name: str, computed: int, moments: Moments) -> Design:
    """A design. What is to be expected of it is the same for all, whatever it rests on itself.

    Half of the measured answer along an error makes the better designs, and all of it the better expectations: those
    were up to 8 times too low on a rough model, where early errors grow.

    Args:
        name: One of `NAMES`.
        computed: How many steps are computed.
        moments: Of the runs.
    """
    made = best_design(computed, moments, settings_named(name, moments))
    return as_foreseen(made, moments, replace(DesignSettings.of(moments), along=1.0))


def name_for(tuned: Sequence[Tuned], computed_steps: int) -> str:
    """The name of the design for a number of computed steps."""
    return next((each.design for each in tuned if each.computed_steps == computed_steps), USUAL)


def designs_to_try(computed: int, moments: Moments, most: int) -> dict[str, Design]:
    """Designs that differ in the steps that they compute, the usual one first.

    Args:
        computed: How many steps are computed.
        moments: Of the runs.
        most: How many designs at most.
    """
    found: dict[str, Design] = {}
    for name in NAMES:
        if len(found) == most:
            break
        made = design_named(name, computed, moments)
        if all(made.mask != other.mask for other in found.values()):
            found[name] = made
    return found

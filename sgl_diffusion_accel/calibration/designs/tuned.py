"""Designs that are foreseen to be about as good as each other, to be tried on the pipeline itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from sgl_diffusion_accel.calibration.designs.answers import Answers, checked_answers
from sgl_diffusion_accel.calibration.designs.design import Design, DesignSettings, Moments, as_foreseen
from sgl_diffusion_accel.calibration.designs.design_search import best_design
from sgl_diffusion_accel.errors import ConfigError
from sgl_diffusion_accel.validate import count, finite, listed, of_type

USUAL = "usual"
"""The design of a plan that nothing was tried for."""

_OWN: dict[str, dict[str, Any]] = {"own errors": {}, "own errors, all along": {"along": 1.0}}
"""Designs that rest on how the model answered to the errors that runs by the usual design left."""

_CHANGES: dict[str, dict[str, Any]] = {
    USUAL: {},
    **_OWN,
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
        gain: How many times as far off runs by the usual design were, the geometric mean over the calls; from 1.
        calls: How many calls that was.
        answers: How the model answered to the errors of runs by the usual design, one entry for each run that told,
            where the design rests on that; as `CachePlan.answers`.

    Raises:
        ConfigError: No steps or no calls, an unknown name, a gain under 1, or answers without need or missing.
        ConfigTypeError: Something has a wrong type.
    """

    computed_steps: int
    design: str
    gain: float
    calls: int
    answers: tuple[Answers, ...] = ()

    def __post_init__(self) -> None:
        for name in ("computed_steps", "calls"):
            object.__setattr__(self, name, count(name, getattr(self, name), 1))
        if of_type("design", self.design, str, f"one of {', '.join(NAMES)}") not in NAMES:
            raise ConfigError(f"design={self.design!r}; allowed: {', '.join(NAMES)}.")
        gain = finite("gain", self.gain, "a number from 1")
        if gain < 1:
            raise ConfigError(f"gain={gain:g}; allowed: a number from 1.")
        object.__setattr__(self, "gain", gain)
        known = listed("answers", self.answers, checked_answers, "a list of lists, one for each run")
        if bool(known) != (self.design in _OWN):
            raise ConfigError(
                f"design={self.design!r} with answers of {len(known)} runs; allowed: some for {' and '.join(_OWN)}, "
                "none for other designs."
            )
        object.__setattr__(self, "answers", known)

    def __str__(self) -> str:
        return "the usual design is the best" if self.design == USUAL else f"{self.gain:.2f} times closer"


def settings_named(name: str, moments: Moments) -> DesignSettings:
    """The settings of a design that is tried.

    Args:
        name: One of `NAMES`.
        moments: Of the runs.
    """
    usual = DesignSettings.of(moments)
    return replace(usual, ridge=usual.ridge * _RIDGE.get(name, 1.0), **_CHANGES.get(name, {}))


def design_named(name: str, computed: int, moments: Moments, answers: Sequence[Answers] = ()) -> Design:
    """A design. What is to be expected of it is the same for all, whatever it rests on itself.

    Half of the measured answer along an error makes the better designs, and all of it the better expectations: those
    were up to 8 times too low on a rough model, where early errors grow.

    Args:
        name: One of `NAMES`.
        computed: How many steps are computed.
        moments: Of the runs.
        answers: What the design rests on in the place of the answers to a disturbance; none for those.
    """
    known = replace(moments, answers=tuple(answers)) if answers else moments
    made = best_design(computed, known, settings_named(name, moments))
    return as_foreseen(made, moments, replace(DesignSettings.of(moments), along=1.0))


def design_tuned(tuned: Sequence[Tuned], computed: int, moments: Moments) -> Design:
    """The design that was chosen for a number of computed steps, the usual one where none was."""
    chosen = next((each for each in tuned if each.computed_steps == computed), None)
    if chosen is None:
        return design_named(USUAL, computed, moments)
    return design_named(chosen.design, computed, moments, chosen.answers)


def designs_to_try(computed: int, moments: Moments, most: int, answers: Sequence[Answers] = ()) -> dict[str, Design]:
    """Designs that differ in the steps that they compute, the usual one first.

    Args:
        computed: How many steps are computed.
        moments: Of the runs.
        most: How many designs at most.
        answers: To the errors of runs by the usual design; without any, no design rests on them.
    """
    found: dict[str, Design] = {}
    for name in NAMES:
        if len(found) == most:
            break
        if name in _OWN and not answers:
            continue
        made = design_named(name, computed, moments, answers_for(name, answers))
        if all(made.mask != other.mask for other in found.values()):
            found[name] = made
    return found


def answers_for(name: str, answers: Sequence[Answers]) -> tuple[Answers, ...]:
    """What a design rests on of the answers to the errors of runs by the usual design: all or none."""
    return tuple(answers) if name in _OWN else ()

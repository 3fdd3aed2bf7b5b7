"""The race of designs in `tune_plan`: which go on to the next call, and which is kept."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from invariants.families import present
from sgl_diffusion_accel import CachePlan, tune_plan
from sgl_diffusion_accel.calibration.designs.tuned import USUAL, Tuned
from sgl_diffusion_accel.calibration.paired_runs import PairedRuns
from sgl_diffusion_accel.calibration.tune_plan import _BROKEN, _Race
from test_check_plan import calls, learned
from test_tune_plan import COMPUTED, error_of


def test_designs_are_compared_on_the_same_calls() -> None:
    family = present("qwen")
    pipe, plan = learned(family)
    given = calls(family, pipe, range(7, 9))
    with torch.no_grad():
        (tuned,) = tune_plan(pipe, plan, given, speedups=[2.4], designs=4).tuned
    assert tuned.design != USUAL
    usual = Tuned(tuned.computed_steps, USUAL, 1.0, 1)
    ratios = [error_of(pipe, plan, usual, call) / error_of(pipe, plan, tuned, call) for call in given]
    assert tuned.gain == pytest.approx(np.exp(np.mean(np.log(ratios))), rel=1e-3)
    assert tuned.calls == len(given)


def test_designs_are_ranked_by_the_calls_so_far() -> None:
    """The usual one has run on all of them already."""

    class Runs:
        def square(self, plan: CachePlan, _: int) -> float:
            return {"stiff": 1.0, "loose": 4.0, "across twice": 9.0}[plan.tuned[0].design]

    race = race_with({USUAL: [np.log(2.0), np.log(1e9)], "stiff": [], "loose": [], "across twice": []}, [])
    race._left = list(race._errors)
    race.run(Runs(), 0)  # type: ignore[arg-type]
    assert race._left == ["stiff", USUAL]


def test_better_half_goes_on_to_the_next_call(monkeypatch: pytest.MonkeyPatch) -> None:
    family = present("wan")
    pipe, plan = learned(family)
    errors: dict[str, list[float]] = {}
    square = PairedRuns.square

    def seen(runs: PairedRuns, tried: CachePlan, computed: int) -> float:
        found = square(runs, tried, computed)
        errors.setdefault(tried.tuned[0].design, []).append(found)
        return found

    monkeypatch.setattr(PairedRuns, "square", seen)
    with torch.no_grad():
        (tuned,) = tune_plan(pipe, plan, calls(family, pipe, range(3)), speedups=[3.0], designs=5).tuned
    assert len(errors) > 3
    assert len(errors[USUAL]) == 3
    means = {name: np.mean(np.log(each)) for name, each in errors.items() if len(each) == 3}
    assert tuned.design == min(means, key=means.__getitem__)
    best = sorted(errors, key=lambda name: errors[name][0])[: (len(errors) + 1) // 2]
    assert {name for name, each in errors.items() if len(each) > 1} == {*best, USUAL}


def race_with(errors: dict[str, list[float]], left: list[str]) -> _Race:
    race = _Race(COMPUTED, learned(present("wan"))[1], 2)
    race._errors, race._left = errors, left
    return race


def test_one_call_that_all_are_far_off_on_does_not_decide() -> None:
    """The mean is of logarithms: what is 4 times as near on one call may be 2 times as far on another."""
    errors = {USUAL: [np.log(1.0), np.log(100.0)], "stiff": [np.log(1 / 16), np.log(400.0)]}
    found = race_with(errors, ["stiff", USUAL]).result()
    assert found.design == "stiff"
    assert found.gain == pytest.approx(2**0.5)
    assert found.calls == 2


def test_usual_design_stays_where_no_other_is_ahead_of_it() -> None:
    """Also where it was dropped from the race after a call that it was worse on."""
    assert race_with({USUAL: [2.0, 0.0], "stiff": [1.5, 1.5]}, ["stiff"]).result() == Tuned(COMPUTED, USUAL, 1.0, 2)


def test_design_that_is_not_finite_loses() -> None:
    for usual, other, wanted in ((0.0, _BROKEN, USUAL), (_BROKEN, 0.0, "stiff"), (_BROKEN, _BROKEN, USUAL)):
        left = ["stiff", USUAL] if other <= usual else [USUAL, "stiff"]
        found = race_with({USUAL: [usual], "stiff": [other]}, left).result()
        assert found.design == wanted
        assert np.isfinite(found.gain)

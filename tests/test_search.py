"""The search for the steps to compute: exact in number, the same every time, better than even masks."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from sgl_diffusion_accel.calibration.designs import design_search
from sgl_diffusion_accel.calibration.designs.design import DesignSettings, design
from sgl_diffusion_accel.calibration.designs.design_search import best_design
from test_design import STEPS, euler_moments, smooth, unipc_moments

MOMENTS = euler_moments(smooth())


@pytest.mark.parametrize("computed", range(1, STEPS + 1))
def test_as_many_steps_are_computed_as_asked_and_the_first_among_them(computed: int) -> None:
    found = best_design(computed, MOMENTS)
    assert sum(found.mask) == computed
    assert found.mask[0]
    assert len(found.weights) == STEPS


@pytest.mark.parametrize("computed", [4, 7])
def test_same_moments_give_the_same_design(computed: int) -> None:
    state = np.random.get_state()[1].tolist()
    found = best_design(computed, MOMENTS)
    design_search._search.cache_clear()
    assert best_design(computed, MOMENTS) == found
    assert np.random.get_state()[1].tolist() == state


@pytest.fixture
def searches(monkeypatch):
    """How often a design was searched for, one entry each."""
    found, search = [], design_search._descend

    def counted(draft):
        found.append(sum(draft.mask))
        return search(draft)

    monkeypatch.setattr(design_search, "_descend", counted)
    design_search._search.cache_clear()
    yield found
    design_search._search.cache_clear()


def test_the_same_is_searched_for_once(searches) -> None:
    copied = replace(MOMENTS, gram=MOMENTS.gram.copy(), response=MOMENTS.response.copy(), early=3.0)
    first = best_design(5, MOMENTS)
    assert best_design(5, copied) is first
    assert best_design(5, MOMENTS, DesignSettings.of(MOMENTS)) is first
    assert searches == [5]


@pytest.mark.parametrize("other", ["steps", "gram", "response", "answers", "reach", "settings"])
def test_whatever_a_design_depends_on_is_searched_for_anew(other, searches) -> None:
    best_design(5, MOMENTS)
    answers = (tuple((float(left), -4.0, 3.0) for left in MOMENTS.left),)
    moments = {
        "gram": replace(MOMENTS, gram=euler_moments(smooth(seed=1)).gram),
        "response": replace(MOMENTS, response=unipc_moments(smooth()).response),
        "answers": replace(MOMENTS, answers=answers),
        "reach": replace(MOMENTS, reach=0.5),
    }.get(other, MOMENTS)
    settings = DesignSettings.of(moments)
    if other == "settings":
        settings = replace(settings, across=0.1)
    found = best_design(6 if other == "steps" else 5, moments, settings)
    assert len(searches) == 2
    assert found == design(found.mask, moments, settings)


@pytest.mark.parametrize("moments_of", [euler_moments, unipc_moments], ids=["euler", "unipc"])
@pytest.mark.parametrize("computed", [3, 5, 8])
def test_found_steps_are_better_than_even_ones(moments_of: object, computed: int) -> None:
    moments = moments_of(smooth())  # type: ignore[operator]
    even = np.zeros(STEPS, dtype=bool)
    even[np.round(np.linspace(0, STEPS - 1, computed)).astype(int)] = True
    assert best_design(computed, moments).error < design(even.tolist(), moments, DesignSettings.of(moments)).error


@pytest.mark.parametrize("computed", [2, 3])
def test_found_steps_are_near_the_best_of_all(computed: int) -> None:
    outputs = smooth(10)
    moments = unipc_moments(outputs)
    masks = [
        [step == 0 or step in others for step in range(10)]
        for others in itertools.combinations(range(1, 10), computed - 1)
    ]
    best = min(design(mask, moments, DesignSettings.of(moments)).error for mask in masks)
    assert best_design(computed, moments).error <= 1.2 * best


def test_more_steps_are_better_as_a_rule() -> None:
    errors = [best_design(computed, MOMENTS).error for computed in (1, 3, 5, 8, 12, 16)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0


def test_runs_of_one_and_two_steps() -> None:
    for steps in (1, 2):
        moments = unipc_moments(smooth(steps))
        for computed in range(1, steps + 1):
            assert sum(best_design(computed, moments).mask) == computed

"""A design's expected errors and weights, against running it on vectors that have the Gram matrix."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import diffusers
import numpy as np
import pytest

from sgl_diffusion_accel.caching.parts.call_policy import DEPTH
from sgl_diffusion_accel.caching.parts.multistep import correct, extrapolate
from sgl_diffusion_accel.calibration.design import Design, DesignSettings, Moments, design
from sgl_diffusion_accel.calibration.design_search import best_design
from sgl_diffusion_accel.loop.scheduler_response import euler, response_of
from zoo.base import flow_euler, unipc_flow

pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")  # KDPM2 and NumPy 2

STEPS = 16
QUIET = DesignSettings(disturbance=0.0)
SIGMAS = [3 * t / (1 + 2 * t) for t in np.linspace(1, 0, STEPS + 1)]


def smooth(steps: int = STEPS, seed: int = 0) -> np.ndarray:
    """Outputs of a run, `[S, elements]`: polynomials of degree 4 with random coefficients, and some noise."""
    random = np.random.default_rng(seed)
    powers = np.vander(np.linspace(0, 1, steps), 5)
    return powers @ random.normal(size=(5, 200)) + 0.01 * random.normal(size=(steps, 200))


def euler_moments(outputs: np.ndarray, early: float = 0.0) -> Moments:
    return Moments(outputs @ outputs.T / outputs.shape[1], euler(SIGMAS), early)


def unipc_moments(outputs: np.ndarray) -> Moments:
    scheduler = unipc_flow()
    scheduler.set_timesteps(len(outputs))
    response = response_of(scheduler, len(outputs))
    assert response is not None
    return Moments(outputs @ outputs.T / outputs.shape[1], response, early=0.0)


def midpoint_moments(outputs: np.ndarray) -> Moments:
    """Of KDPM2, whose every second output leads to a midpoint and has no weight in the end."""
    scheduler = diffusers.KDPM2DiscreteScheduler()
    scheduler.set_timesteps(len(outputs) // 2)
    response = response_of(scheduler, len(scheduler.timesteps))
    assert response is not None
    outputs = outputs[: len(response) - 1]
    return Moments(outputs @ outputs.T / outputs.shape[1], response, early=0.0)


MASKS = ["x.x.x.x.x.x.x.x.", "xxx...x....x..xx", "x...............", "xxxxxxxxxxxxxxx.", "x.....xx...x.x.x"]


def mask_of(text: str) -> tuple[bool, ...]:
    return tuple(each == "x" for each in text)


def played(made: Design, outputs: np.ndarray, moments: Moments) -> np.ndarray:
    """Relative errors of the latents when the weights are applied to the outputs themselves, `[S + 1]`."""
    given = np.stack([sum(weight * outputs[node] for node, weight in each.items()) for each in made.weights])
    off = moments.response @ (given - outputs)
    return np.sqrt((off**2).mean(1) / moments.moved)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("moments_of", [euler_moments, unipc_moments], ids=["euler", "unipc"])
@pytest.mark.parametrize("settings", [QUIET, DesignSettings(disturbance=0.0, ridge=0.1, foresight=1.0, depth=2)])
def test_expected_errors_are_those_of_playing_it(mask: str, moments_of: object, settings: DesignSettings) -> None:
    outputs = smooth()
    moments = moments_of(outputs)  # type: ignore[operator]
    made = design(mask_of(mask), moments, settings)
    np.testing.assert_allclose(made.errors, played(made, outputs, moments), rtol=1e-4, atol=1e-7)
    assert made.error == made.errors[-1]


def test_noise_of_the_answers_is_expected_as_it_is_drawn() -> None:
    """With κ the answers of computed steps err by κ/σ times the error of the latents, in a direction of its own."""
    outputs = smooth()
    moments, settings = euler_moments(outputs), DesignSettings(disturbance=0.5)
    made = design(mask_of(MASKS[1]), moments, settings)
    elements = 40_000
    random = np.random.default_rng(1)
    factor = np.linalg.cholesky(moments.gram + 1e-12 * np.eye(STEPS))
    true = factor @ random.normal(size=(STEPS, elements))
    answers, given, errors = np.zeros_like(true), np.zeros_like(true), []
    for step in range(STEPS + 1):
        off = moments.response[step, :step] @ (given - true)[:step]
        errors.append(np.sqrt((off**2).mean() / moments.moved))
        if step == STEPS:
            break
        if made.mask[step]:
            size = settings.disturbance / moments.left[step] * np.sqrt((off**2).mean())
            answers[step] = true[step] + size * random.normal(size=elements)
        given[step] = sum(weight * answers[node] for node, weight in made.weights[step].items())
    np.testing.assert_allclose(errors, made.errors, rtol=0.05, atol=1e-6)


def midpoint_of(moments: Moments) -> int:
    """A step in mid-run whose output leads to a midpoint, and is forgotten there."""
    middle = moments.steps // 2
    return next(step for step in range(middle, moments.steps) if moments.response[-1, step] == 0)


def test_skipped_output_that_leads_to_a_midpoint_costs_by_the_answer_that_it_puts_off() -> None:
    moments = midpoint_moments(smooth())
    gone = midpoint_of(moments)
    mask = [step != gone for step in range(moments.steps)]
    line = DesignSettings(disturbance=0.5, ridge=1e12)
    made = design(mask, moments, line)
    move = np.abs(moments.response[-1]).sum()
    answer = line.disturbance * made.errors[gone + 1] / (moments.left[gone + 1] * move)
    assert made.errors[gone + 1] > 0
    assert made.errors[gone + 2] == pytest.approx(answer * abs(moments.response[gone + 2, gone + 1]), rel=1e-6)
    assert made.error > 0
    assert design(mask, moments, DesignSettings(disturbance=0.0, ridge=1e12)).error < 1e-9, "no answer minds it"


def test_what_was_skipped_before_a_midpoint_is_put_right_by_the_answer_that_is_given_there() -> None:
    moments = midpoint_moments(smooth())
    gone = midpoint_of(moments) - 1
    made = design([step != gone for step in range(moments.steps)], moments, QUIET)
    assert abs(made.weights[gone + 2][gone + 2] - 1) > 0.05
    assert made.error == pytest.approx(made.errors[gone + 3])
    assert made.error < 0.8 * made.errors[gone + 1]


@pytest.mark.parametrize("scale", [1e-2, 15.0])
def test_scale_of_the_latents_does_not_matter(scale: float) -> None:
    """Schedulers of EDM's kind move the latents by hundreds, those of flow matching by one."""
    moments = euler_moments(smooth())
    large = Moments(moments.gram, scale * moments.response, moments.early)
    one, other = (design(mask_of(MASKS[1]), each, DesignSettings()) for each in (moments, large))
    np.testing.assert_allclose(one.errors, other.errors, rtol=1e-6)


def test_mask_of_ones_has_no_error_and_only_own_weights() -> None:
    made = design([True] * STEPS, euler_moments(smooth()), DesignSettings())
    assert made.errors == (0.0,) * (STEPS + 1)
    assert made.weights == tuple({step: 1.0} for step in range(STEPS))


def test_errors_are_none_until_the_first_skipped_step() -> None:
    made = design(mask_of("xxxx.xxxxxxxxxxx"), euler_moments(smooth()), DesignSettings())
    assert made.errors[:5] == (0.0,) * 5
    assert made.errors[5] > 0


@pytest.mark.parametrize("degree", [0, 1])
@pytest.mark.parametrize("mask", ["xx.xx.xx.xx.xx.x", "xx...x...x...x.x"])
def test_constant_and_straight_runs_are_reproduced(mask: str, degree: int) -> None:
    powers = np.vander(np.arange(STEPS) / STEPS, degree + 1)
    outputs = powers @ np.random.default_rng(0).normal(size=(degree + 1, 50))
    made = design(mask_of(mask), euler_moments(outputs), QUIET)
    assert made.error < 1e-6


@pytest.mark.parametrize("degree", [2, 3])
def test_weights_learn_polynomials_from_the_moments(degree: int) -> None:
    powers = np.vander(np.arange(STEPS) / STEPS, degree + 1)
    outputs = powers @ np.random.default_rng(0).normal(size=(degree + 1, 50))
    settings = DesignSettings(disturbance=0.0, ridge=1e-12)
    mask = "xxxx.xxx.xx.xx.x"
    assert design(mask_of(mask), euler_moments(outputs), settings).error < 1e-5


def test_ridge_pulls_the_weights_to_the_line_and_its_correction() -> None:
    made = design(mask_of("xxx..xx........x"), euler_moments(smooth()), DesignSettings(disturbance=0.0, ridge=1e9))
    for step in (3, 4):
        wanted = extrapolate([2, 1, 0], step)
        assert made.weights[step] == pytest.approx({**dict.fromkeys((2, 1, 0), 0.0), **wanted}, abs=1e-4)
    taken = {step: made.weights[step] for step in (3, 4)}
    wanted = correct([5, 2, 1, 0], taken, euler(SIGMAS)[-1].tolist())
    assert made.weights[5] == pytest.approx(wanted, abs=1e-4)


def test_fitted_weights_are_better_than_the_line() -> None:
    outputs = smooth()
    moments = euler_moments(outputs)
    for mask in MASKS[:3]:
        fitted = design(mask_of(mask), moments, QUIET).error
        assert fitted <= design(mask_of(mask), moments, DesignSettings(disturbance=0.0, ridge=1e9)).error * 1.001


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_no_more_outputs_are_used_than_are_kept(depth: int) -> None:
    made = design(mask_of(MASKS[1]), euler_moments(smooth()), DesignSettings(depth=depth))
    for step, weights in enumerate(made.weights):
        nodes = [node for node in range(step, -1, -1) if made.mask[node]][:depth]
        assert set(weights) <= set(nodes)
    assert DesignSettings().depth <= DEPTH


def test_more_computed_steps_have_a_lower_expected_error() -> None:
    moments = euler_moments(smooth())
    masks = [[step % every == 0 for step in range(STEPS)] for every in (8, 4, 2, 1)]
    errors = [design(mask, moments, DesignSettings()).error for mask in masks]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 2 * errors[1]


def test_more_disturbance_has_a_higher_expected_error() -> None:
    moments = euler_moments(smooth())
    errors = [design(mask_of(MASKS[1]), moments, DesignSettings(disturbance=each)).error for each in (0.0, 0.3, 1.0)]
    assert errors == sorted(errors)


@pytest.mark.parametrize("early", [0.5, 2.0, 8.0])
def test_growth_counts_what_each_gap_has_left_by_the_share_of_the_run_where_it_ends(early: float) -> None:
    outputs = smooth()
    mask = mask_of("xx..x...x..x..xx")
    plain, grown = (design(mask, euler_moments(outputs, each), QUIET) for each in (0.0, early))
    assert grown.weights == plain.weights
    assert grown.errors[:-1] == plain.errors[:-1]
    given = np.stack([sum(weight * outputs[node] for node, weight in each.items()) for each in plain.weights])
    moments = euler_moments(outputs)
    added, begin = 0.0, 0
    for end in (step for step, computed in enumerate(mask) if computed):
        left = moments.response[-1, begin : end + 1] @ (given - outputs)[begin : end + 1]
        factor = 1 + early * (SIGMAS[end] / SIGMAS[0]) ** 5
        added, begin = added + (factor**2 - 1) * (left**2).mean(), end + 1
    assert grown.error == pytest.approx(np.sqrt(plain.error**2 + added / moments.moved), rel=1e-6)
    assert grown.error > plain.error


def test_growth_moves_computed_steps_to_the_start() -> None:
    outputs = smooth(30)
    early, late = (
        Moments(outputs @ outputs.T / outputs.shape[1], euler(np.linspace(1, 0, 31).tolist()), growth)
        for growth in (16.0, 0.0)
    )
    assert sum(best_design(12, early).mask[:8]) > sum(best_design(12, late).mask[:8]) + 1


def test_size_of_the_outputs_does_not_matter() -> None:
    moments = euler_moments(smooth())
    large = Moments(moments.gram * 1e8, moments.response, moments.early)
    one, other = (design(mask_of(MASKS[1]), each, DesignSettings()) for each in (moments, large))
    np.testing.assert_allclose(one.errors, other.errors, rtol=1e-6)


def test_share_of_the_run_that_is_left_is_sigma_for_euler() -> None:
    np.testing.assert_allclose(euler_moments(smooth()).left, np.array(SIGMAS[:-1]) / SIGMAS[0], atol=1e-9)


def test_run_that_does_not_move_has_no_error() -> None:
    with np.errstate(invalid="ignore"):
        made = design(mask_of(MASKS[0]), Moments(np.zeros((STEPS, STEPS)), euler(SIGMAS)), DesignSettings())
    assert made.error == 0.0


def moments_for(scheduler: Any, steps: int = 12) -> Moments:
    scheduler.set_timesteps(steps)
    response = response_of(scheduler, len(scheduler.timesteps))
    assert response is not None
    outputs = smooth(len(scheduler.timesteps))
    return Moments(outputs @ outputs.T / outputs.shape[1], response)


@pytest.mark.parametrize(
    ("make", "looks_back"),
    [
        (flow_euler, False),
        (partial(diffusers.DDIMScheduler, clip_sample=False), False),
        (diffusers.CogVideoXDDIMScheduler, False),
        (diffusers.EulerDiscreteScheduler, False),
        (diffusers.KDPM2DiscreteScheduler, False),
        (unipc_flow, True),
        (diffusers.DPMSolverMultistepScheduler, True),
        (diffusers.DEISMultistepScheduler, True),
        (diffusers.PNDMScheduler, True),
    ],
)
def test_schedulers_that_look_back_get_more_careful_designs(make: Callable[[], Any], looks_back: bool) -> None:
    moments = moments_for(make())
    assert moments.looks_back is looks_back
    settings = DesignSettings.of(moments)
    assert (settings.disturbance > DesignSettings.disturbance) is looks_back
    assert (settings.ridge > DesignSettings.ridge) is looks_back
    assert best_design(5, moments) == best_design(5, moments, settings)

"""A design's expected errors and weights, against running it on vectors that have the Gram matrix."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import diffusers
import numpy as np
import pytest

from sgl_diffusion_accel.caching.parts.call_policy import DEPTH
from sgl_diffusion_accel.caching.parts.multistep import correct, extrapolate
from sgl_diffusion_accel.calibration.designs.answers import Answers
from sgl_diffusion_accel.calibration.designs.design import Design, DesignSettings, Moments, design
from sgl_diffusion_accel.calibration.designs.design_search import best_design
from sgl_diffusion_accel.loop.scheduler_response import euler, response_of
from zoo.base import flow_euler, unipc_flow

pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")  # KDPM2 and NumPy 2

STEPS = 16
QUIET = DesignSettings(along=0.0, across=0.0)
SIGMAS = [3 * t / (1 + 2 * t) for t in np.linspace(1, 0, STEPS + 1)]


def smooth(steps: int = STEPS, seed: int = 0) -> np.ndarray:
    """Outputs of a run, `[S, elements]`: polynomials of degree 4 with random coefficients, and some noise."""
    random = np.random.default_rng(seed)
    powers = np.vander(np.linspace(0, 1, steps), 5)
    return powers @ random.normal(size=(5, 200)) + 0.01 * random.normal(size=(steps, 200))


def euler_moments(outputs: np.ndarray, answers: tuple[Answers, ...] = ()) -> Moments:
    return Moments(outputs @ outputs.T / outputs.shape[1], euler(SIGMAS), answers)


def unipc_moments(outputs: np.ndarray) -> Moments:
    scheduler = unipc_flow()
    scheduler.set_timesteps(len(outputs))
    response = response_of(scheduler, len(outputs))
    assert response is not None
    return Moments(outputs @ outputs.T / outputs.shape[1], response)


def midpoint_moments(outputs: np.ndarray) -> Moments:
    """Of KDPM2, whose every second output leads to a midpoint and has no weight in the end."""
    scheduler = diffusers.KDPM2DiscreteScheduler()
    scheduler.set_timesteps(len(outputs) // 2)
    response = response_of(scheduler, len(scheduler.timesteps))
    assert response is not None
    outputs = outputs[: len(response) - 1]
    return Moments(outputs @ outputs.T / outputs.shape[1], response)


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
@pytest.mark.parametrize("settings", [QUIET, dataclasses.replace(QUIET, ridge=0.1, foresight=1.0, depth=2)])
def test_expected_errors_are_those_of_playing_it(mask: str, moments_of: object, settings: DesignSettings) -> None:
    outputs = smooth()
    moments = moments_of(outputs)  # type: ignore[operator]
    made = design(mask_of(mask), moments, settings)
    np.testing.assert_allclose(made.errors, played(made, outputs, moments), rtol=1e-4, atol=1e-7)
    assert made.error == made.errors[-1]


def turned(levels: np.ndarray) -> np.ndarray:
    """T, on what has four blocks of coordinates: each of the first three into the next, the third into itself."""
    found = np.zeros_like(levels)
    found[1], found[2] = levels[0], levels[1] + levels[2]
    return found


def answered(made: Design, moments: Moments, settings: DesignSettings, elements: int = 40_000) -> list[float]:
    """Relative errors of the latents when a model is played that answers as a design foresees, `[S + 1]`."""
    random = np.random.default_rng(1)
    steps, answer, move = moments.steps, moments.answer, np.abs(moments.response[-1]).sum()
    factor = np.linalg.cholesky(moments.gram + 1e-12 * np.eye(steps))
    true = np.zeros((steps, 4, elements))  # the v in the first block, every z in the last
    true[:, 0] = factor @ np.linalg.qr(random.normal(size=(elements, steps)))[0].T * np.sqrt(elements)
    answers, given, errors = np.zeros_like(true), np.zeros_like(true), []
    for step in range(steps + 1):
        off = np.tensordot(moments.response[step, :step], (given - true)[:step], 1)
        errors.append(float(np.sqrt((off**2).sum(0).mean() / moments.moved)))
        if step == steps:
            return errors
        if made.mask[step]:
            along, across = settings.along * answer.along[step], settings.across * answer.across[step]
            known, fresh = (off[:3] ** 2).sum(0).mean(), (off[3] ** 2).mean()
            own = along * off + across * np.sqrt(1 - settings.fresh) * turned(off)
            own[3] += across * np.sqrt(settings.fresh * known + fresh) * random.normal(size=elements)
            answers[step] = true[step] + own / (moments.left[step] * move)
        given[step] = sum(weight * answers[node] for node, weight in made.weights[step].items())
    raise AssertionError


@pytest.mark.parametrize("mask", [MASKS[1], MASKS[4]])
@pytest.mark.parametrize("fresh", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("along", [-0.5, 0.0, 0.7])
def test_answers_are_expected_as_they_are_played(along: float, fresh: float, mask: str) -> None:
    """In the direction of an error, in one that is turned the same way at all steps, and in one of its own."""
    moments = euler_moments(smooth(), (((1.0, 2 * along, 0.8), (0.5, along, 0.6), (0.05, along, 0.4)),))
    settings = DesignSettings(along=0.5, across=0.8, fresh=fresh)
    made = design(mask_of(mask), moments, settings)
    # What is drawn is off by half a percent; what is not is exact.
    np.testing.assert_allclose(made.errors, answered(made, moments, settings), rtol=0.02 if fresh else 1e-4, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 15.0])
def test_error_that_is_not_put_right_goes_on_by_the_answer_along_it(scale: float) -> None:
    """x' = a·x/σ multiplies it by 1 + a·Δσ/σ at each step, in whatever units the latents are."""
    known = (((1.0, -3.0, 0.0), (0.6, -3.0, 0.0), (0.4, 1.0, 0.0), (0.1, 0.5, 0.0)),)
    moments = euler_moments(smooth(), known)
    moments = dataclasses.replace(moments, response=scale * moments.response)
    errors = design(mask_of("xx.xxxxxxxxxxxxx"), moments, DesignSettings(along=1.0)).errors
    sigmas = np.array(SIGMAS) / SIGMAS[0]
    factors = 1 + moments.answer.along * np.diff(sigmas) / sigmas[:-1]
    assert errors[4] > 0
    np.testing.assert_allclose(errors[4:], errors[4] * np.cumprod([1.0, *factors[4:]]), rtol=1e-9)


def midpoint_of(moments: Moments) -> int:
    """A step in mid-run whose output leads to a midpoint, and is forgotten there."""
    middle = moments.steps // 2
    return next(step for step in range(middle, moments.steps) if moments.response[-1, step] == 0)


def test_skipped_output_that_leads_to_a_midpoint_costs_by_the_answer_that_it_puts_off() -> None:
    moments = midpoint_moments(smooth())
    gone = midpoint_of(moments)
    mask = [step != gone for step in range(moments.steps)]
    line = DesignSettings(ridge=1e12)
    made = design(mask, moments, line)
    move = np.abs(moments.response[-1]).sum()
    answer = line.across * moments.answer.across[gone + 1] * made.errors[gone + 1] / (moments.left[gone + 1] * move)
    assert made.errors[gone + 1] > 0
    assert made.errors[gone + 2] == pytest.approx(answer * abs(moments.response[gone + 2, gone + 1]), rel=1e-6)
    assert made.error > 0
    assert design(mask, moments, dataclasses.replace(QUIET, ridge=1e12)).error < 1e-9, "no answer minds it"


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
    large = Moments(moments.gram, scale * moments.response)
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
    settings = dataclasses.replace(QUIET, ridge=1e-12)
    mask = "xxxx.xxx.xx.xx.x"
    assert design(mask_of(mask), euler_moments(outputs), settings).error < 1e-5


def test_ridge_pulls_the_weights_to_the_line_and_its_correction() -> None:
    made = design(mask_of("xxx..xx........x"), euler_moments(smooth()), dataclasses.replace(QUIET, ridge=1e9))
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
        assert fitted <= design(mask_of(mask), moments, dataclasses.replace(QUIET, ridge=1e9)).error * 1.001


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


@pytest.mark.parametrize("fresh", [0.0, 0.6, 1.0])
def test_more_across_has_a_higher_expected_error(fresh: float) -> None:
    moments = euler_moments(smooth())
    settings = [DesignSettings(across=each, fresh=fresh) for each in (0.0, 0.3, 1.0)]
    errors = [design(mask_of(MASKS[1]), moments, each).error for each in settings]
    assert errors == sorted(set(errors))


def growing(along: float) -> tuple[Answers, ...]:
    """Answers of a model whose early errors grow, where `along` is under 0; later ones fade."""
    return (((1.0, along, 0.3), (0.7, along, 0.3), (0.5, 0.5, 0.3), (0.1, 0.5, 0.3)),)


def test_early_errors_that_grow_have_a_higher_expected_error() -> None:
    outputs = smooth()
    early, late = mask_of("xx..x..xxxxxxxxx"), mask_of("xxxxxxxxxxxx.x.x")
    errors = {
        mask: [
            design(mask, euler_moments(outputs, growing(each)), DesignSettings()).error for each in (0.5, -1.0, -4.0)
        ]
        for mask in (early, late)
    }
    assert errors[early][2] > 1.5 * errors[early][1] > 1.5 * errors[early][0]
    assert errors[late] == pytest.approx([errors[late][0]] * 3, rel=1e-9), "it is over before anything is skipped"


def test_early_errors_that_grow_move_computed_steps_to_the_start() -> None:
    outputs = smooth(30)
    gram, response = outputs @ outputs.T / outputs.shape[1], euler(np.linspace(1, 0, 31).tolist())
    grown, plain = (best_design(12, Moments(gram, response, growing(along))) for along in (-8.0, 0.5))
    assert sum(grown.mask[:10]) > sum(plain.mask[:10]) + 1


def test_size_of_the_outputs_does_not_matter() -> None:
    moments = euler_moments(smooth())
    large = Moments(moments.gram * 1e8, moments.response)
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
    assert (settings.ridge > DesignSettings.ridge) is looks_back
    assert dataclasses.replace(settings, ridge=DesignSettings.ridge) == DesignSettings()
    assert best_design(5, moments) == best_design(5, moments, settings)

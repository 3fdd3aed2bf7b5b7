"""Predictors are weights on the last residuals: their formulas, against independent ones."""

from __future__ import annotations

import dataclasses
import inspect
import math
import random

import pytest

from sgl_diffusion_accel.caching.parts import predictors
from sgl_diffusion_accel.caching.parts.predictors import Predictor, Reuse, Taylor

ALL = [Reuse(), Taylor(1), Taylor(2), Taylor(3), Taylor(4)]
TIMES = {
    "even": [12.0, 10.0, 8.0, 6.0, 4.0],
    "uneven": [20.0, 17.0, 16.0, 9.0, 4.0],
    "sigma": [0.41, 0.55, 0.71, 0.9, 1.0],
}


def predict(predictor, times, values, target):
    return sum(weight * value for weight, value in zip(predictor.weights(times, target), values, strict=True))


def taylorseer(order, times, values, target):
    """TaylorSeer as published: derivatives are updated at each computed step, oldest first, then expanded."""
    derivatives: list[float] = []
    last = None
    for time, value in zip(reversed(times), reversed(values), strict=True):
        updated = [value]
        for i in range(min(order, len(derivatives))):
            updated.append((updated[i] - derivatives[i]) / (time - last))
        derivatives, last = updated, time
    return sum(f * (target - times[0]) ** i / math.factorial(i) for i, f in enumerate(derivatives))


def test_every_predictor_is_tested():
    classes = {
        cls
        for _, cls in inspect.getmembers(predictors, inspect.isclass)
        if issubclass(cls, Predictor) and not inspect.isabstract(cls)
    }
    assert classes == {type(predictor) for predictor in ALL}


@pytest.mark.parametrize("predictor", ALL, ids=str)
@pytest.mark.parametrize("clock", TIMES)
def test_weights_sum_to_one_however_few_steps_are_known(predictor, clock):
    for known in range(1, predictor.depth + 1):
        times = TIMES[clock][:known]
        for ahead in (1, 2, 7):
            weights = predictor.weights(times, times[0] + ahead * (times[0] - TIMES[clock][1]))
            assert len(weights) == known
            assert sum(weights) == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("predictor", ALL, ids=str)
@pytest.mark.parametrize("clock", TIMES)
def test_at_the_last_computed_step_the_prediction_is_its_residual(predictor, clock):
    times = TIMES[clock][: predictor.depth]
    assert predictor.weights(times, times[0]) == pytest.approx([1.0] + [0.0] * (len(times) - 1))


@pytest.mark.parametrize("clock", TIMES)
@pytest.mark.parametrize("known", [1, 2, 3, 4])
def test_reuse_is_the_newest_residual(clock, known):
    assert Reuse().weights(TIMES[clock][:known], 99.0) == (1.0,) + (0.0,) * (known - 1)
    assert Reuse().depth == 1


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_taylor_keeps_one_step_more_than_its_order(order):
    assert Taylor(order).depth == order + 1


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("clock", TIMES)
def test_taylor_is_the_published_formula(order, clock):
    generator = random.Random(order)
    values = [generator.uniform(-2, 2) for _ in TIMES[clock]]
    for known in range(1, order + 2):
        times, seen = TIMES[clock][:known], values[:known]
        for ahead in (0.5, 1.0, 3.0):
            target = times[0] + ahead * (TIMES[clock][0] - TIMES[clock][1])
            expected = taylorseer(order, times, seen, target)
            assert predict(Taylor(order), times, seen, target) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("clock", TIMES)
def test_first_order_is_exact_on_straight_lines(clock):
    times = TIMES[clock][:2]
    for target in (0.3, 13.0, 25.0):
        assert predict(Taylor(1), times, [3 - 2 * t for t in times], target) == pytest.approx(3 - 2 * target)


@pytest.mark.parametrize("order", [2, 3, 4])
def test_higher_orders_are_exact_on_straight_lines_and_constants_too(order):
    times = TIMES["uneven"][: order + 1]
    assert predict(Taylor(order), times, [5.0] * len(times), 24.0) == pytest.approx(5.0)
    assert predict(Taylor(order), times, [3 - 2 * t for t in times], 24.0) == pytest.approx(3 - 2 * 24.0)


@pytest.mark.parametrize("order", [2, 3, 4])
def test_highest_derivative_of_a_polynomial_is_exact_at_even_gaps(order):
    """Far ahead the highest term alone counts: kⁿ for the polynomial tⁿ."""
    times = [-float(i) for i in range(order + 1)]
    ahead = 1e6
    assert predict(Taylor(order), times, [t**order for t in times], ahead) == pytest.approx(ahead**order, rel=1e-4)


@pytest.mark.parametrize("known", [1, 2, 3])
def test_with_fewer_steps_than_the_order_needs_it_is_the_order_that_they_allow(known):
    times = TIMES["uneven"][:known]
    lower = Taylor(known - 1) if known > 1 else Reuse()
    assert Taylor(4).weights(times, 23.0) == pytest.approx(lower.weights(times, 23.0))


def test_first_order_acts_as_soon_as_two_steps_are_known():
    assert Taylor(1).weights([1.0, 0.0], 2.0) == pytest.approx((2.0, -1.0))
    assert Taylor(3).weights([1.0, 0.0], 4.0) == pytest.approx((4.0, -3.0))


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_weights_do_not_depend_on_the_unit_or_the_origin_of_the_clock(order):
    """So sigmas, which fall, and steps, which rise, need nothing of their own."""
    times = TIMES["uneven"][: order + 1]
    other = [0.9 - 0.03 * time for time in times]
    weights = Taylor(order).weights(times, 22.0)
    assert Taylor(order).weights(other, 0.9 - 0.03 * 22.0) == pytest.approx(weights, rel=1e-6)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("times", [[0.5, 0.5], [0.5, 0.5, 0.8], [0.5, 0.8, 0.8], [0.5, 0.5, 0.5], [0.5, 0.5, 0.8, 0.8]])
def test_steps_at_the_same_time_are_no_division_by_zero(order, times):
    """Second-order schedulers (Heun, DPM2) call the model twice at a noise level."""
    times = times[: order + 1]
    weights = Taylor(order).weights(times, 0.4)
    assert all(math.isfinite(weight) for weight in weights)
    assert sum(weights) == pytest.approx(1.0)


@pytest.mark.parametrize("predictor", ALL, ids=str)
def test_predictors_have_no_state_that_could_change(predictor):
    before = hash(predictor)
    predictor.weights([3.0, 2.0][: predictor.depth], 4.0)
    assert hash(predictor) == before
    with pytest.raises(dataclasses.FrozenInstanceError):
        predictor.order = 7

"""The polynomial of TeaCache: NumPy's value, held at the low end of its range."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from sgl_diffusion_accel import ConfigError, ConfigTypeError
from sgl_diffusion_accel.caching.teacache.coefficients import DEGREE, TeaCacheCoefficients
from sgl_diffusion_accel.errors import AccelError

FIVE = (3.0, -2.0, 1.0, 0.5, -0.25)
WAN = (2.39676752e3, -1.31110545e3, 2.01331979e2, -8.29855975, 1.37887774e-1)


@pytest.mark.parametrize("coefficients", [FIVE, WAN, (0, 0, 0, 0, 0), (0, 0, 0, 0, 7), (-1, 0, 0, 0, 0)])
def test_value_is_numpy_s(coefficients):
    polynomial = TeaCacheCoefficients(coefficients)
    for change in (-0.3, 0.0, 1e-6, 0.013, 0.0512, 0.4, 1.0, 30.0):
        assert polynomial(change) == pytest.approx(np.polyval(coefficients, change), rel=1e-12, abs=0)


def test_random_polynomials_have_numpy_s_values():
    generator = np.random.default_rng(3)
    for _ in range(50):
        coefficients = generator.normal(size=5) * 10.0 ** generator.integers(-3, 6, size=5)
        change = float(generator.uniform(0, 0.5))
        scale = np.polyval(np.abs(coefficients), change)
        assert TeaCacheCoefficients(coefficients)(change) == pytest.approx(
            np.polyval(coefficients, change), abs=1e-13 * scale
        )


def test_what_numpy_fitted_is_taken_as_it_is():
    changes = np.linspace(0.02, 0.4, 30)
    moved = np.polyval(FIVE, changes)
    polynomial = TeaCacheCoefficients(np.polyfit(changes, moved, DEGREE))
    np.testing.assert_allclose([polynomial(change) for change in changes], moved, rtol=1e-9)


def test_below_the_range_the_value_is_that_of_its_end():
    polynomial = TeaCacheCoefficients(FIVE, low=0.1, high=0.3)
    assert polynomial(0.0) == polynomial(0.05) == polynomial(0.1) == pytest.approx(np.polyval(FIVE, 0.1))
    assert polynomial(0.11) == pytest.approx(np.polyval(FIVE, 0.11))
    assert polynomial(0.05) != pytest.approx(np.polyval(FIVE, 0.05))


def test_above_the_range_the_value_is_not_held():
    """What to do there is the policy's business."""
    assert TeaCacheCoefficients(FIVE, low=0.1, high=0.3)(0.5) == pytest.approx(np.polyval(FIVE, 0.5))


def test_without_a_low_end_nothing_is_held():
    assert TeaCacheCoefficients(FIVE, high=0.3)(0.0) == FIVE[-1]


@pytest.mark.parametrize("change", [math.inf, math.nan])
def test_change_that_is_not_finite_gives_no_number(change):
    assert not math.isfinite(TeaCacheCoefficients(FIVE)(change))


@pytest.mark.parametrize(
    "given",
    [
        list(WAN),
        np.array(WAN),
        iter(WAN),
        [np.float32(1), np.int64(2), Fraction(1, 2), 3, 4.0],
        torch.tensor(WAN, dtype=torch.float64).tolist(),
    ],
    ids=["list", "ndarray", "iterator", "mixed", "tolist"],
)
def test_any_sequence_of_numbers_becomes_a_tuple_of_floats(given):
    polynomial = TeaCacheCoefficients(given)
    assert type(polynomial.coefficients) is tuple
    assert {type(each) for each in polynomial.coefficients} == {float}
    assert tuple(polynomial) == polynomial.coefficients
    assert len(polynomial) == DEGREE + 1


@pytest.mark.parametrize("count", [0, 1, 4, 6, 10])
def test_other_than_five_numbers_are_refused_with_where_to_get_them(count):
    with pytest.raises(ConfigError, match=rf"^coefficients has {count} numbers; allowed: 5, highest.*numpy\.polyfit"):
        TeaCacheCoefficients([0.5] * count)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, np.float32("nan")])
@pytest.mark.parametrize("place", [0, 4])
def test_number_that_is_not_finite_is_refused(bad, place):
    given = list(FIVE)
    given[place] = bad
    with pytest.raises(ConfigError, match=rf"^coefficients has {float(bad)}; allowed: finite"):
        TeaCacheCoefficients(given)


@pytest.mark.parametrize("wrong", [None, 5, 0.5, True, "12345", b"12345", "1,2,3,4,5"])
def test_what_is_no_sequence_is_refused_as_such(wrong):
    with pytest.raises(ConfigTypeError, match=rf"^coefficients is a {type(wrong).__name__}; allowed: 5 numbers"):
        TeaCacheCoefficients(wrong)


@pytest.mark.parametrize("wrong", ["1", None, True, [1.0], 1j, np.zeros(2), torch.tensor(1.0)])
def test_entry_that_is_no_number_is_refused_as_such(wrong):
    with pytest.raises(ConfigTypeError, match=r"^coefficients has .*; allowed: 5 numbers, highest degree first"):
        TeaCacheCoefficients([1.0, 2.0, 3.0, 4.0, wrong])


@pytest.mark.parametrize(
    ("low", "high"),
    [(0.3, 0.1), (-0.1, 0.3), (None, -1.0), (-1e-9, None), (math.nan, 0.3), (0.1, math.nan), (0.1, math.inf)],
)
def test_range_that_cannot_be_is_refused_with_what_is_allowed(low, high):
    with pytest.raises(ConfigError, match=rf"^the fitted range is {low} to {high}; allowed: two finite numbers from 0"):
        TeaCacheCoefficients(FIVE, low=low, high=high)


@pytest.mark.parametrize(("low", "high"), [("0.1", None), (None, [0.1]), (True, 2.0), (0.1, 1j)])
def test_range_of_another_type_is_refused_as_such(low, high):
    with pytest.raises(ConfigTypeError, match="range"):
        TeaCacheCoefficients(FIVE, low=low, high=high)


@pytest.mark.parametrize("wrong", [{1.0, 2.0, 3.0, 4.0, 5.0}, dict.fromkeys(FIVE)])
def test_what_has_no_order_of_its_own_is_refused(wrong):
    with pytest.raises(ConfigTypeError, match="coefficients is a"):
        TeaCacheCoefficients(wrong)


@pytest.mark.parametrize(("low", "high"), [(0, 0), (0.1, 0.1), (0.0, None), (None, 2.5), (None, None)])
def test_range_of_one_point_or_with_an_open_end_is_allowed(low, high):
    assert (
        TeaCacheCoefficients(FIVE, low=low, high=high).low,
        TeaCacheCoefficients(FIVE, low=low, high=high).high,
    ) == (low, high)


def test_refusals_are_caught_as_the_built_in_errors():
    with pytest.raises(ValueError, match="4 numbers") as value:
        TeaCacheCoefficients([1.0] * 4)
    with pytest.raises(TypeError, match="NoneType") as kind:
        TeaCacheCoefficients(None)
    assert isinstance(value.value, AccelError)
    assert isinstance(kind.value, AccelError)


def test_polynomial_is_frozen_and_can_be_a_key():
    polynomial = TeaCacheCoefficients(list(FIVE), low=0.1, high=0.3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        polynomial.low = 0.0
    assert {polynomial: 1}[TeaCacheCoefficients(np.array(FIVE), low=0.1, high=0.3)] == 1

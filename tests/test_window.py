"""Which steps may be skipped: the same rule written a second time, in whole numbers and fractions."""

from __future__ import annotations

import dataclasses
import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest

from sgl_diffusion_accel import ConfigError, ConfigTypeError
from sgl_diffusion_accel.caching.teacache.skip_window import Window
from sgl_diffusion_accel.errors import AccelError


def steps_of(window, total):
    start, stop = window.bounds(total)
    return list(range(start, stop))


@pytest.mark.parametrize(
    ("start", "end", "total", "bounds"),
    [
        (5, -1, 50, (5, 49)),
        (1, -1, 50, (1, 49)),
        (0, -1, 50, (1, 49)),
        (5, 30, 50, (5, 30)),
        (5, 50, 50, (5, 49)),
        (5, 1000, 50, (5, 49)),
        (-10, -2, 50, (40, 48)),
        (-10, 45, 50, (40, 45)),
        (-1000, -1, 50, (1, 49)),
        (0.1, 0.9, 50, (5, 45)),
        (0.0, 1.0, 50, (1, 49)),
        (0.1, -5, 50, (5, 45)),
        (3, 0.5, 50, (3, 25)),
        (0.25, 0.75, 10, (2, 7)),
    ],
)
def test_bounds_are_steps_from_the_start_from_the_end_or_shares(start, end, total, bounds):
    assert Window(start, end).bounds(total) == bounds


def test_all_but_the_first_and_the_last_step_may_be_skipped_by_default():
    assert steps_of(Window(), 8) == [1, 2, 3, 4, 5, 6]


BOUNDS = [0, 1, 2, 7, 40, -1, -2, -7, -40, 0.0, 0.1, 0.29, 0.5, 0.93, 1.0]


@pytest.mark.parametrize("total", [*range(1, 13), 50])
def test_first_and_last_step_are_never_inside(total):
    for start in BOUNDS:
        for end in BOUNDS:
            try:
                window = Window(start, end)
            except ConfigError:
                continue
            assert not {0, total - 1} & set(steps_of(window, total)), window
            assert set(steps_of(window, total)) <= set(range(total))


@pytest.mark.parametrize("total", [10, 28, 30, 50, 100, 1000])
def test_share_of_hundredths_is_rounded_down_as_in_exact_arithmetic(total):
    """As floats, 0.29 of 100 are 28.999999999999996."""
    for hundredths in range(1, 100):
        exact = math.floor(Fraction(hundredths, 100) * total)
        assert Window(hundredths / 100, -1).bounds(total)[0] == max(exact, 1), hundredths
        assert Window(0, hundredths / 100).bounds(total)[1] == min(exact, total - 1), hundredths


@pytest.mark.parametrize(
    ("window", "longest"), [(Window(), 2), (Window(5, -1), 6), (Window(-2, -1), 2), (Window(0.5, 0.6), 4)]
)
def test_short_run_leaves_no_step_and_is_no_error(window, longest):
    for total in range(1, longest + 1):
        assert steps_of(window, total) == []
    assert steps_of(window, longest + 1) != []


@pytest.mark.parametrize(
    ("start", "end"),
    [(5, 5), (6, 5), (-1, -1), (-1, -5), (0.5, 0.5), (0.9, 0.1), (0, 0), (1, 0), (-3, 0), (0.5, 0), (3, 0.0)],
)
def test_window_that_is_always_empty_is_refused_with_what_to_type(start, end):
    with pytest.raises(
        ConfigError, match=rf"^start_skipping={start} and end_skipping={end} leave no step.*start_skipping=5"
    ):
        Window(start, end)


@pytest.mark.parametrize(("start", "end"), [(0, 1), (-1, 100), (-1, 1.0), (1.0, -1), (1.0, 5)])
def test_window_of_the_first_or_the_last_step_alone_is_refused(start, end):
    with pytest.raises(ConfigError, match="leave no step"):
        Window(start, end)


@pytest.mark.parametrize(("start", "end"), [(5, -1), (-1000, 3), (40, 0.5), (0.9, 3), (0.9, -40)])
def test_window_that_is_empty_in_some_runs_alone_is_allowed(start, end):
    assert Window(start, end).start == start


@pytest.mark.parametrize("name", ["start", "end"])
@pytest.mark.parametrize("wrong", ["5", None, True, False, [5], (1, 2), 1j, Decimal("0.5"), np.array([1, 2])])
def test_bound_of_another_type_is_refused_as_such(name, wrong):
    with pytest.raises(ConfigTypeError, match=rf"^{name}_skipping=.*{type(wrong).__name__}.*whole number.*share"):
        Window(**{name: wrong})


@pytest.mark.parametrize("name", ["start", "end"])
@pytest.mark.parametrize("wrong", [-0.1, 1.0001, 5.0, -1.0, math.nan, math.inf, -math.inf])
def test_share_out_of_range_is_refused_with_how_to_give_a_step(name, wrong):
    with pytest.raises(ConfigError, match=rf"^{name}_skipping={wrong} is a share.*0\.0 to 1\.0.*{name}_skipping=5"):
        Window(**{name: wrong})


@pytest.mark.parametrize("integer", [np.int64, np.int32, np.uint8])
def test_numpy_s_integers_are_steps(integer):
    window = Window(integer(5), np.int16(-1))
    assert window == Window(5, -1)
    assert (type(window.start), type(window.end)) == (int, int)
    assert window.bounds(50) == (5, 49)


def test_other_reals_are_shares():
    assert Window(np.float64(0.1), Fraction(9, 10)) == Window(0.1, 0.9)
    assert Window(np.float32(0.25), 1.0).bounds(100) == (25, 99)


def test_share_of_all_is_no_step_number():
    """1.0 is the end of the run, 1 its second step."""
    assert Window(0.5, 1.0).bounds(10) == (5, 9)
    with pytest.raises(ConfigError):
        Window(5, 1)


def test_words_are_those_of_the_settings():
    assert str(Window(5, -1)) == "start_skipping=5, end_skipping=-1"
    assert str(Window(0.1, 0.9)) == "start_skipping=0.1, end_skipping=0.9"


def test_window_is_frozen_and_can_be_a_key():
    window = Window(5, -1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        window.start = 0
    assert {window: 1}[Window(5, -1)] == 1


@pytest.mark.parametrize("error", [ValueError, AccelError])
def test_refusals_are_caught_as_the_built_in_errors(error):
    with pytest.raises(error):
        Window(0.9, 0.1)

"""Moments carried over to other timesteps."""

from __future__ import annotations

import numpy as np
import pytest

from sgl_diffusion_accel.calibration.designs.design import carry_over

MEASURED = np.linspace(1000, 20, 12).tolist()


def vectors(times: list[float], degree: int) -> np.ndarray:
    coefficients = np.random.default_rng(0).normal(size=(degree + 1, 60))
    return np.vander(np.asarray(times) / 1000, degree + 1) @ coefficients


def gram(times: list[float], degree: int) -> np.ndarray:
    outputs = vectors(times, degree)
    found: np.ndarray = outputs @ outputs.T
    return found


def test_same_timesteps_leave_the_moments() -> None:
    measured = gram(MEASURED, 9)
    np.testing.assert_allclose(carry_over(measured, MEASURED, MEASURED), measured, rtol=1e-12)


@pytest.mark.parametrize("degree", range(4))
@pytest.mark.parametrize("steps", [1, 5, 30])
def test_cubics_are_carried_over_exactly(degree: int, steps: int) -> None:
    wanted = np.linspace(990, 25, steps).tolist()
    np.testing.assert_allclose(carry_over(gram(MEASURED, degree), MEASURED, wanted), gram(wanted, degree), rtol=1e-8)


def test_outside_of_what_was_measured_the_nearest_is_taken() -> None:
    measured = gram(MEASURED, 5)
    np.testing.assert_allclose(
        carry_over(measured, MEASURED, [2000.0, 1000.0, 20.0, 0.0]), measured[np.ix_([0, 0, -1, -1], [0, 0, -1, -1])]
    )


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_few_measured_steps(steps: int) -> None:
    measured = MEASURED[:steps]
    found = carry_over(gram(measured, steps - 1), measured, MEASURED[:4])
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[:steps, :steps], gram(measured, steps - 1), rtol=1e-8)


def test_result_is_a_gram_matrix() -> None:
    found = carry_over(gram(MEASURED, 8), MEASURED, np.linspace(1000, 0, 50).tolist())
    assert np.linalg.eigvalsh((found + found.T) / 2)[0] > -1e-8 * np.abs(found).max()
    np.testing.assert_allclose(found, found.T, rtol=1e-9)


def test_repeated_timesteps_stay_finite() -> None:
    """Schedulers of second order, such as Heun's, come to each timestep twice."""
    measured = [1000.0, 800.0, 800.0, 500.0, 500.0, 100.0, 100.0]
    with np.errstate(divide="ignore", invalid="ignore"):
        found = carry_over(np.eye(7), measured, [900.0, 600.0, 300.0])
    assert np.isfinite(found).all()

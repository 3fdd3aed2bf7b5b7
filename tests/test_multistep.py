"""Weights of prediction and correction, against the polynomials and sums that they stand for."""

from __future__ import annotations

import random

import numpy as np
import pytest

from sgl_diffusion_accel.caching.parts.multistep import (
    SLOPE,
    Weights,
    correct,
    correction,
    extrapolate,
    interpolate,
    lagrange,
)


def value(weights: Weights, outputs: np.ndarray) -> float:
    return float(sum(weight * outputs[node] for node, weight in weights.items()))


STEPS = np.arange(20.0)


@pytest.mark.parametrize("nodes", [[4], [4, 3], [9, 4, 1]])
def test_without_slope_the_newest_output_is_repeated(nodes: list[int]) -> None:
    assert extrapolate(nodes, 12, slope=0) == {nodes[0]: 1.0}


def test_one_output_is_repeated() -> None:
    assert extrapolate([3], 7) == {3: 1.0}


@pytest.mark.parametrize(("nodes", "step"), [([4, 3], 5), ([9, 4], 12), ([9, 4, 2, 0], 17)])
@pytest.mark.parametrize("slope", [0.3, SLOPE, 1.0])
def test_prediction_follows_a_share_of_the_slope(nodes: list[int], step: int, slope: float) -> None:
    outputs = 3 - 0.7 * STEPS
    weights = extrapolate(nodes, step, slope)
    assert set(weights) == set(nodes[:2])
    assert sum(weights.values()) == pytest.approx(1)
    assert value(weights, outputs) == pytest.approx(outputs[nodes[0]] - 0.7 * slope * (step - nodes[0]))


@pytest.mark.parametrize("nodes", [[7], [7, 3], [7, 5, 2], [9, 6, 5, 1]])
def test_polynomials_through_their_nodes_are_exact(nodes: list[int]) -> None:
    outputs = np.polyval(np.arange(1.0, len(nodes) + 1), STEPS / 10)
    for step in range(10):
        weights = lagrange(nodes, step)
        assert sum(weights.values()) == pytest.approx(1)
        assert value(weights, outputs) == pytest.approx(outputs[step])


@pytest.mark.parametrize("nodes", [[7], [7, 3], [7, 5, 2], [9, 6, 5, 1]])
def test_interpolation_is_the_mean_of_line_and_parabola(nodes: list[int]) -> None:
    outputs = np.polyval([0.3, -1.0, 2.0, 1.0], STEPS / 10)
    for step in range(nodes[1] + 1 if len(nodes) > 1 else 0, nodes[0]):
        line, parabola = (value(lagrange(nodes[:points], step), outputs) for points in (2, 3))
        weights = interpolate(nodes, step)
        assert sum(weights.values()) == pytest.approx(1)
        assert value(weights, outputs) == pytest.approx((line + parabola) / 2)


@pytest.mark.parametrize("node", [5, 7])
def test_interpolation_at_the_ends_of_a_gap_is_their_output(node: int) -> None:
    weights = interpolate([7, 5, 2, 0], node)
    assert weights == {each: float(each == node) for each in (7, 5, 2)}


def test_nothing_skipped_leaves_the_output() -> None:
    assert correct([5, 4, 3], {}, STEPS.tolist()) == {5: 1.0}


@pytest.mark.parametrize("seed", range(5))
def test_corrected_sum_is_that_of_the_interpolated_outputs(seed: int) -> None:
    """What the scheduler adds up over a gap and the step after it is what it would of interpolated outputs."""
    draw = random.Random(seed)
    nodes = [12, 7, 5, 2]
    outputs = np.array([draw.gauss(0, 1) for _ in range(20)])
    final = [draw.uniform(0.1, 1) * draw.choice([1, -1]) for _ in range(20)]
    taken = {step: extrapolate(nodes[1:], step) for step in range(8, 12)}
    weights = correct(nodes, taken, final)
    assert sum(weights.values()) == pytest.approx(1)
    given = sum(final[step] * value(each, outputs) for step, each in taken.items()) + final[12] * value(
        weights, outputs
    )
    wanted = sum(final[step] * value(interpolate(nodes, step), outputs) for step in range(8, 13))
    assert given == pytest.approx(wanted)


@pytest.mark.parametrize(("degree", "share"), [(1, 0.0), (2, 0.5)])
def test_correction_is_exact_for_lines_and_takes_half_of_a_bend(degree: int, share: float) -> None:
    nodes, final = [12, 7, 5, 2], np.linspace(-0.2, -0.01, 20).tolist()
    outputs = np.polyval([2.0, 0.5, 3.0][-degree - 1 :], STEPS / 10)
    taken = {step: extrapolate(nodes[1:], step) for step in range(8, 12)}
    weights = correct(nodes, taken, final)
    given = sum(final[step] * value(each, outputs) for step, each in taken.items()) + final[12] * value(
        weights, outputs
    )
    true = sum(final[step] * outputs[step] for step in range(8, 13))
    line = sum(final[step] * value(lagrange(nodes[:2], step), outputs) for step in range(8, 13))
    assert given - true == pytest.approx(share * (line - true), abs=1e-12)


def test_correction_at_a_step_without_weight_is_left_out() -> None:
    """Some schedulers give the last output no weight (DEIS with flow sigmas): nothing can be put right there."""
    final = [1.0] * 12 + [0.0]
    assert correct([12, 9, 8], {step: {9: 1.0} for step in (10, 11)}, final) == {12: 1.0}


@pytest.mark.parametrize("seed", range(5))
def test_correction_is_the_best_compromise_of_the_next_latents_and_the_final_ones(seed: int) -> None:
    draw = np.random.default_rng(seed)
    final, following = (draw.uniform(0.5, 2, 20).tolist() for _ in range(2))
    nodes, taken = [9, 7, 5], {8: {7: 1.0}}
    weights = correct(nodes, taken, final, following)
    rows = np.array([final, following])
    best = np.linalg.lstsq(rows[:, 9:10], rows[:, 8], rcond=None)[0][0]
    assert correction(8, 9, final, following) == pytest.approx(best)
    assert sum(weights.values()) == pytest.approx(1)
    wanted = {node: best * weight for node, weight in interpolate(nodes, 8).items()}
    assert weights[9] == pytest.approx(1 + wanted[9])
    assert weights[7] == pytest.approx(wanted[7] - best)


def test_where_the_next_latents_go_as_the_final_ones_correction_is_exact_in_both() -> None:
    final = np.linspace(0.5, 2, 20).tolist()
    twice = [2 * each for each in final]
    taken = {step: extrapolate([7, 5, 2], step) for step in range(8, 12)}
    assert correct([12, 7, 5], taken, final, twice) == pytest.approx(correct([12, 7, 5], taken, final))

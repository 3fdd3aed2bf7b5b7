"""Gap control on synthetic curves: where it computes, and what it guards against."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from sgl_diffusion_accel.caching.parts.call_policy import DEPTH
from sgl_diffusion_accel.caching.parts.gap_control import GapControl, GapSettings, LineGrowth, late_growth
from sgl_diffusion_accel.caching.parts.multistep import correct, extrapolate
from sgl_diffusion_accel.caching.parts.policies import Decision, Position, Tally
from sgl_diffusion_accel.loop.scheduler_response import response_of
from zoo.base import flow_euler, unipc_flow

STEPS = 40
EVEN = np.full(STEPS, -1 / STEPS)
SETTINGS = GapSettings(tolerance=1e-3)


def decide(gaps: GapControl, step: int) -> Decision:
    return gaps.decide(Position(step, len(gaps.final), step), Tally(), unasked)


def unasked() -> float:
    raise AssertionError("gap control takes no signal")


def run(curve: Callable[[float], Any], settings: GapSettings = SETTINGS, final: Any = EVEN, **kw: Any) -> Run:
    return Run(curve, GapControl(settings, np.asarray(final), **kw))


class Run:
    """What gap control does where the output at step s is `curve(s / steps)`, a number or a vector."""

    def __init__(self, curve: Callable[[float], Any], pace: GapControl) -> None:
        total = len(pace.final)
        outputs = [np.atleast_1d(np.asarray(curve(step / total), dtype=float)) for step in range(total)]
        nodes: list[int] = []
        self.mask: list[bool] = []
        self.reasons: list[str] = []
        self.given = []
        for step in range(total):
            decision = decide(pace, step)
            self.mask.append(decision.compute)
            self.reasons.append(decision.reason)
            if decision.compute:
                nodes = [step, *nodes][:DEPTH]
            weights = pace.weights(step, nodes)
            assert set(weights) <= set(nodes)
            assert sum(weights.values()) == pytest.approx(1)
            self.given.append(sum(weight * outputs[node] for node, weight in weights.items()))
            expected = pace.predicted(step, nodes) if decision.compute else None
            if expected is not None:
                guess = sum(weight * outputs[node] for node, weight in expected.items())
                size = float(np.linalg.norm(outputs[step]))
                pace.observe(step, float(np.linalg.norm(guess - outputs[step])) / size if size else math.inf)
        true = sum(weight * output for weight, output in zip(pace.final, outputs, strict=True))
        made = sum(weight * output for weight, output in zip(pace.final, self.given, strict=True))
        self.error = float(np.linalg.norm(made - true) / np.linalg.norm(true))

    @property
    def computed(self) -> int:
        return sum(self.mask)

    @property
    def longest(self) -> int:
        return max(map(len, "".join("x" if each else "." for each in self.mask).split("x")))


def wave(frequency: float) -> Callable[[float], Any]:
    return lambda t: [2 + math.sin(frequency * t), math.cos(frequency * t)]


def test_smoother_curves_take_fewer_steps() -> None:
    counts = [run(wave(frequency)).computed for frequency in (0.5, 2, 6, 15, 40)]
    assert counts == sorted(counts)
    assert counts[0] <= 12
    assert counts[-1] >= 35


@pytest.mark.parametrize("frequency", [1, 3, 8])
def test_larger_tolerance_takes_fewer_steps_and_errs_more(frequency: float) -> None:
    tolerances = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
    runs = [run(wave(frequency), GapSettings(tolerance)) for tolerance in tolerances]
    counts = [each.computed for each in runs]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1]
    assert runs[0].error < runs[-1].error
    for each, tolerance in zip(runs, tolerances, strict=True):
        assert each.error < 10 * tolerance


@pytest.mark.parametrize("frequency", [1, 3, 8])
def test_correction_puts_most_of_the_error_right(frequency: float) -> None:
    alike = dataclasses.replace(SETTINGS, interpolation=1.0)  # as if the correction were blind
    corrected, left = (run(wave(frequency), alike, corrects=corrects) for corrects in (True, False))
    assert corrected.mask == left.mask
    assert corrected.error < 0.5 * left.error


@pytest.mark.parametrize("frequency", [1, 3, 8])
def test_where_nothing_is_put_right_more_is_computed(frequency: float) -> None:
    corrected, left = (run(wave(frequency), corrects=corrects) for corrects in (True, False))
    assert left.computed > corrected.computed


def test_straight_line_is_put_right_exactly() -> None:
    found = run(lambda t: [1 + t, 2 - t])
    assert found.computed < STEPS / 2
    assert found.error < 1e-9


def test_run_that_does_not_move_is_left_alone_as_long_as_the_guards_allow() -> None:
    found = run(lambda _: [1, 2])
    assert found.error < 1e-9
    assert found.longest == SETTINGS.longest_gap
    assert set(found.reasons) <= {"warm-up", "last step", "longest gap", "estimated error within tolerance"}


@pytest.mark.parametrize("warm_up", [1, 2, 3, 6])
def test_first_steps_and_the_last_are_computed(warm_up: int) -> None:
    found = run(wave(0.5), dataclasses.replace(SETTINGS, warm_up=warm_up))
    assert all(found.mask[:warm_up])
    assert found.mask[-1]
    assert found.reasons[:warm_up] == ["warm-up"] * warm_up


@pytest.mark.parametrize("longest", [1, 2, 5])
def test_no_gap_is_longer_than_allowed(longest: int) -> None:
    assert run(wave(0.2), dataclasses.replace(SETTINGS, longest_gap=longest)).longest == longest


def test_gap_grows_by_a_factor_at_most() -> None:
    found = run(wave(0.2), dataclasses.replace(SETTINGS, growth=2, longest_gap=100))
    gaps = [len(each) for each in "".join("x" if each else "." for each in found.mask).split("x")]
    assert all(gap <= 2 * (before + 1) for before, gap in itertools.pairwise(gaps))


@pytest.mark.parametrize("steps", range(1, SETTINGS.fewest_steps))
def test_few_steps_are_all_computed(steps: int) -> None:
    found = run(wave(0.1), GapSettings(1.0), np.full(steps, -1 / steps))
    assert all(found.mask)
    assert set(found.reasons) == {"too few steps"}


@pytest.mark.parametrize("frequency", [0.5, 5, 50])
def test_tolerance_0_computes_every_step(frequency: float) -> None:
    assert all(run(wave(frequency), GapSettings(0.0)).mask)


def test_tolerance_0_computes_every_step_of_a_curve_that_does_not_move() -> None:
    assert all(run(lambda _: 1.0, GapSettings(0.0)).mask)


@pytest.mark.parametrize("error", [math.nan, math.inf])
def test_error_that_is_no_number_means_computing(error: float) -> None:
    pace = GapControl(GapSettings(1.0), EVEN)
    for step in range(STEPS):
        assert decide(pace, step).compute
        if step >= 2:
            pace.observe(step, error)


def test_bend_is_noticed_at_the_next_computed_step() -> None:
    found = run(lambda t: [1, 0] if t < 0.5 else [math.cos(80 * (t - 0.5)), math.sin(80 * (t - 0.5))])
    noticed = found.mask.index(True, STEPS // 2 + 1)  # the first computed step that is not on the straight part
    assert found.mask.count(False) >= 8
    assert all(found.mask[noticed + 2 :]), "nothing of a fast curve can be predicted; a long gap blurs where it began"


def test_calm_is_believed_slowly() -> None:
    """The curvature falls by a share a step at most, so that one lucky prediction does not open a gap."""
    pace = GapControl(dataclasses.replace(SETTINGS, memory=0.8), EVEN)
    for step in range(3):
        decide(pace, step)
    pace.observe(2, 1.0)
    decide(pace, 3)
    pace.observe(3, 0.0)
    assert decide(pace, 4).compute


@pytest.mark.parametrize("share", [0.9, 0.5, 0.1])
def test_calm_is_believed_by_the_geometric_mean(share: float) -> None:
    pace = GapControl(dataclasses.replace(SETTINGS, memory=0.3), EVEN)
    for step in range(4):
        decide(pace, step)
        pace.observe(step, 1.0) if step == 2 else None
    before = pace._roughness
    pace.observe(3, share)
    assert before is not None
    assert pace._roughness == pytest.approx(max(share**0.7, 0.3) * before, rel=1e-6)
    pace.observe(3, 5.0)
    assert pace._roughness == pytest.approx(5.0 * before, rel=1e-6), "what is rougher is believed at once"


def test_early_errors_count_more() -> None:
    """The same curve forwards: where errors of the start grow, gaps there are shorter, and the end keeps its own."""
    flat, grown = (run(wave(3), dataclasses.replace(SETTINGS, early=early)) for early in (0.0, 20.0))
    assert sum(grown.mask[3:15]) > sum(flat.mask[3:15])
    assert sum(grown.mask[25:]) <= sum(flat.mask[25:]) + 1


def test_growth_of_errors_is_one_at_the_end_and_falls_all_the_way() -> None:
    grown = [late_growth(left, 8.0) for left in np.linspace(1, 0, 20)]
    assert grown[0] == 9.0
    assert grown[-1] == 1.0
    assert grown == sorted(grown, reverse=True)
    assert late_growth(0.7, 0.0) == 1.0


def test_growth_of_the_line_counts_in_noise_levels() -> None:
    even = LineGrowth(np.full(10, 0.1))
    assert even([4, 2], 7) == pytest.approx((3 * 5 / 2) ** 0.6)
    assert even([4], 7) == pytest.approx((3 * 6 / 2) ** 0.6)
    long = LineGrowth(np.array([0.05] * 5 + [0.15] * 5))
    assert long([6, 5], 7) > even([6, 5], 7) > long([2, 1], 3)
    # A midpoint has no weight in the end, and its distance counts a quarter.
    assert LineGrowth(np.array([0.5, 0.0, 0.5, 0.0]))([1, 0], 2) == pytest.approx((0.25 * 2.25 / 2) ** 0.6)


@pytest.mark.parametrize("sign", [1, -1])
def test_sign_of_the_schedulers_weights_does_not_matter(sign: int) -> None:
    assert run(wave(3), final=sign * EVEN).mask == run(wave(3)).mask


def test_size_of_the_schedulers_weights_does_not_matter() -> None:
    assert run(wave(3), final=1000 * EVEN).mask == run(wave(3)).mask


def test_gaps_are_shorter_where_steps_weigh_more() -> None:
    early = np.where(np.arange(STEPS) < 20, 1.0, 0.05)
    found = run(wave(3), final=early)
    assert sum(found.mask[3:20]) >= sum(run(wave(3), final=early[::-1]).mask[3:20])


def test_skipped_step_takes_the_line_and_a_computed_one_corrects() -> None:
    pace = GapControl(GapSettings(1.0), EVEN)
    for step in range(3):
        decide(pace, step)
        assert pace.weights(step, list(range(step, -1, -1))) == {step: 1.0}
    pace.observe(2, 1e-6)
    skipped = {}
    for step in (3, 4):
        assert not decide(pace, step).compute
        skipped[step] = pace.weights(step, [2, 1, 0])
        assert skipped[step] == extrapolate([2, 1, 0], step)
    assert decide(pace, 5).compute
    assert pace.weights(5, [5, 2, 1, 0]) == correct([5, 2, 1, 0], skipped, EVEN.tolist())
    assert pace.weights(6, [6, 5, 2, 1]) == {6: 1.0}, "a gap is put right once"


def test_another_model_starts_anew() -> None:
    pace = GapControl(GapSettings(1.0), EVEN)
    for step in range(8):
        if decide(pace, step).compute and step >= 2:
            pace.observe(step, 1e-6)
    decide(pace, 8)
    pace.restart(Position(8, STEPS, 8))
    assert pace.weights(8, [8]) == {8: 1.0}
    assert pace.predicted(8, [8]) is None
    for step in (9, 10):
        assert decide(pace, step).reason == "warm-up"
    assert decide(pace, 11).reason == "nothing to predict from"


def test_outputs_are_needed_until_the_last_step_of_a_run_that_may_skip() -> None:
    pace = GapControl(SETTINGS, EVEN)
    assert all(pace.needs_later(step) for step in range(STEPS - 1))
    assert not pace.needs_later(STEPS - 1)
    assert not any(GapControl(SETTINGS, np.ones(5)).needs_later(step) for step in range(5))


def test_nothing_is_expected_of_the_first_two_steps() -> None:
    pace = GapControl(SETTINGS, EVEN)
    assert pace.predicted(0, [0]) is None
    assert pace.predicted(1, [1, 0]) is None
    assert pace.predicted(5, [5, 2, 1]) == extrapolate([2, 1], 5)


@pytest.mark.parametrize("switch", [12, 20, 33])
def test_an_expert_ends_with_a_computed_step(switch: int) -> None:
    alone = run(math.sin, SETTINGS)
    assert not all(alone.mask[:-1][step - 1] for step in (12, 20, 33))
    seen = run(math.sin, SETTINGS, switch=switch)
    assert seen.mask[switch - 1]
    assert seen.mask[: switch - 1] == alone.mask[: switch - 1]


MIDPOINTS = np.tile([0.0, -2 / STEPS], STEPS // 2)  # every second output leads to a midpoint, and is forgotten there
PASSING = np.where(MIDPOINTS == 0, 0.5 / STEPS, 0.0)


@pytest.mark.parametrize("frequency", [1, 8])
@pytest.mark.parametrize("tolerance", [1e-6, 1e-4, 1e-3, 1e-2])
def test_without_passing_outputs_every_decision_is_the_same(frequency: float, tolerance: float) -> None:
    one = run(wave(frequency), GapSettings(tolerance))
    other = run(wave(frequency), GapSettings(tolerance), passing=np.zeros(STEPS))
    assert one.mask == other.mask
    assert one.error == other.error


def test_outputs_that_pass_count_by_their_influence() -> None:
    free, counted = (
        [run(wave(4), GapSettings(each), MIDPOINTS, passing=passing) for each in (1e-12, 1e-5, 1e-4, 1e-3)]
        for passing in (None, PASSING)
    )
    assert all(not all(each.mask) for each in free), "as if they cost nothing"
    assert all(counted[0].mask)
    counts = [each.computed for each in counted]
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] < STEPS


def test_computed_output_without_weight_leaves_the_correction_to_the_next() -> None:
    pace = GapControl(SETTINGS, np.array([-1.0, -1.0, -1.0, -1.0, 0.0, -1.0] + [-1.0] * 6))
    for step, nodes in ((0, [0]), (1, [1, 0]), (2, [2, 1, 0])):
        assert pace.weights(step, nodes) == {step: 1.0}
    taken = pace.weights(3, [2, 1, 0])
    assert pace.weights(4, [4, 2, 1, 0]) == {4: 1.0}
    nodes = [5, 4, 2, 1]
    assert pace.weights(5, nodes) == correct(nodes, {3: taken}, pace.final.tolist()) != {5: 1.0}


@pytest.mark.parametrize(("steps", "times", "warm_up"), [(50, 1.0, 3), (20, 2.5**1.5, 2), (200, 1 / 8, 3)])
def test_settings_are_for_runs_of_50_steps(steps: int, times: float, warm_up: int) -> None:
    expected = dataclasses.replace(SETTINGS, tolerance=pytest.approx(times * 1e-3), warm_up=warm_up)
    assert SETTINGS.in_run_of(steps) == expected
    assert GapSettings(0.0).in_run_of(steps).tolerance == 0.0


def test_short_runs_keep_a_warm_up_that_is_shorter_still() -> None:
    assert dataclasses.replace(SETTINGS, warm_up=1).in_run_of(20).warm_up == 1
    assert dataclasses.replace(SETTINGS, warm_up=0).in_run_of(20).warm_up == 0


def test_after_two_steps_the_first_output_stands_for_the_second() -> None:
    pace = GapControl(SETTINGS.in_run_of(20), np.full(20, -1 / 20))
    assert [decide(pace, step).reason for step in (0, 1)] == ["warm-up", "warm-up"]
    assert pace.predicted(0, [0]) is None
    assert pace.predicted(1, [1, 0]) == {0: 1.0}
    pace.observe(1, 0.002)
    assert not decide(pace, 2).compute
    rough = GapControl(SETTINGS.in_run_of(20), np.full(20, -1 / 20))
    assert all(decide(rough, step).compute for step in (0, 1))
    rough.observe(1, 1.0)
    assert decide(rough, 2).compute


def test_a_longer_warm_up_asks_for_the_line_alone() -> None:
    assert GapControl(SETTINGS, EVEN).predicted(1, [1, 0]) is None


def response(make: Callable[[], Any], steps: int = STEPS) -> np.ndarray:
    scheduler = make()
    scheduler.set_timesteps(steps)
    found = response_of(scheduler, steps)
    assert found is not None
    return found


def test_under_euler_the_latents_on_the_way_change_nothing() -> None:
    euler = response(flow_euler)
    for tolerance in (1e-4, 1e-3, 1e-2):
        one, other = (run(wave(3), GapSettings(tolerance), euler[-1], response=each) for each in (None, euler))
        assert one.mask == other.mask
        assert one.error == pytest.approx(other.error, abs=1e-9)


def test_under_a_scheduler_that_looks_back_less_is_skipped_and_nothing_at_the_end() -> None:
    unipc = response(unipc_flow)
    rash, careful = (run(wave(3), SETTINGS, unipc[-1], response=each) for each in (None, unipc))
    assert careful.computed > rash.computed
    assert all(careful.mask[-4:])
    assert not all(careful.mask)


def test_under_a_scheduler_that_looks_back_the_last_five_steps_are_computed_at_any_tolerance() -> None:
    unipc = response(unipc_flow)
    for given, last in ((None, 2), (unipc, 5)):
        mask = run(wave(3), dataclasses.replace(SETTINGS, tolerance=10.0), unipc[-1], response=given).mask
        assert all(mask[-last:])
        assert not mask[-last - 1]


def test_under_a_scheduler_that_looks_back_the_next_latents_are_put_right_too() -> None:
    unipc = response(unipc_flow)
    outputs = np.array([np.atleast_1d(wave(6)(step / STEPS)) for step in range(STEPS)])
    worst = []
    for given in (None, unipc):
        pace = GapControl(dataclasses.replace(SETTINGS, tolerance=1.0), unipc[-1], response=given, _roughness=0.0)
        for step in range(10):
            pace.compute(step)
        taken = pace.weights(10, [9, 8, 7, 6])
        pace.compute(11)
        weights = pace.weights(11, [11, 9, 8, 7])
        off = np.zeros_like(outputs)
        off[10] = sum(weight * outputs[node] for node, weight in taken.items()) - outputs[10]
        off[11] = sum(weight * outputs[node] for node, weight in weights.items()) - outputs[11]
        worst.append(float(np.linalg.norm(unipc[12] @ off)))
    assert worst[1] < 0.5 * worst[0]

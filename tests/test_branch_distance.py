"""How far cond and uncond are apart: measured, and what the adaptive cache makes of it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from invariants import transformer_outputs
from invariants.families import present
from sgl_diffusion_accel.caching.cache_patch import put_around
from sgl_diffusion_accel.caching.outputs.branch_distance import BranchDistance, distance_of
from sgl_diffusion_accel.caching.parts.gap_control import GapControl, GapSettings
from sgl_diffusion_accel.caching.parts.policies import Decision, Position, Tally
from sgl_diffusion_accel.targets import find_targets

STEPS = 50
EVEN = np.full(STEPS, -1 / STEPS)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def apart(cond: torch.Tensor, uncond: torch.Tensor) -> float:
    return float((cond.double() - uncond.double()).norm() / cond.double().norm())


def taken(distance: BranchDistance) -> float | None:
    squares = distance.squares()
    return None if squares is None else distance_of(squares.tolist())


@pytest.mark.parametrize("first", ["cond", "uncond"])
def test_branches_may_come_in_any_order(first: str) -> None:
    outputs = {"cond": drawn(2, 8), "uncond": drawn(2, 8, seed=1)}
    distance = BranchDistance()
    for name in (first, *(outputs.keys() - {first})):
        distance.add(name, (outputs[name],), 4.0)
    assert taken(distance) == pytest.approx(apart(outputs["cond"], outputs["uncond"]))
    assert taken(distance) is None, "each step anew"


def test_one_batch_holds_the_unconditional_half_first() -> None:
    uncond, cond = drawn(2, 8), 3 * drawn(2, 8, seed=1)
    distance = BranchDistance()
    distance.add("cond_uncond", (torch.cat([uncond, cond]),), 4.0)
    assert taken(distance) == pytest.approx(apart(cond, uncond))


@pytest.mark.parametrize(("name", "order"), [("uncond+cond", 1), ("cond+uncond", -1)])
def test_one_batch_may_be_named(name: str, order: int) -> None:
    uncond, cond = drawn(2, 8), 3 * drawn(2, 8, seed=1)
    distance = BranchDistance()
    distance.add(name, (torch.cat([uncond, cond][::order]),), 4.0)
    assert taken(distance) == pytest.approx(apart(cond, uncond))
    distance.add("cond#2", (torch.cat([uncond, cond]),), 4.0)
    assert taken(distance) is None, "no pair, though its batch is even"


@pytest.mark.parametrize("order", [1, -1])
def test_parts_that_were_found_count_if_they_are_right(order: int) -> None:
    uncond, cond = drawn(2, 8), 3 * drawn(2, 8, seed=1)
    weights = [torch.full((2, 1), weight) for weight in (-3.0, 4.0)]
    for is_right, wanted in ((True, pytest.approx(apart(cond, uncond))), (False, None)):
        distance = BranchDistance()
        distance.meet([uncond, cond][::order], weights[::order], torch.tensor(is_right))
        assert taken(distance) == wanted
    distance.meet([uncond, cond, cond], [*weights, weights[0]], torch.tensor(True))
    assert taken(distance) is None, "of three parts it is not known which is which"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_does_not_overflow(dtype: torch.dtype) -> None:
    cond, uncond = (300 * drawn(2, 4096, seed=seed).to(dtype) for seed in (0, 1))
    distance = BranchDistance()
    distance.add("cond", (cond,), 4.0)
    distance.add("uncond", (uncond,), 4.0)
    assert taken(distance) == pytest.approx(apart(cond, uncond), rel=1e-4)


def test_there_is_none_without_guidance_alone_or_between_unlike_shapes() -> None:
    distance = BranchDistance()
    for guidance in (None, 1.0):
        distance.add("cond", (drawn(2, 8),), guidance)
        distance.add("uncond", (drawn(2, 8),), guidance)
    assert taken(distance) is None
    distance.add("cond", (drawn(2, 8),), 4.0)
    assert taken(distance) is None
    distance.add("cond", (drawn(2, 8),), 4.0)
    distance.add("uncond", (drawn(3, 8),), 4.0)
    assert taken(distance) is None
    distance.add("cond_uncond", (drawn(1, 8),), 4.0)
    assert taken(distance) is None
    distance.add("cond", (torch.zeros(2, 8),), 4.0)
    distance.add("uncond", (torch.zeros(2, 8),), 4.0)
    assert taken(distance) is None


class Seeing(GapControl):
    """Keeps the distances that it is told."""

    seen: dict[int, float]

    def see_distance(self, step: int, distance: float) -> None:
        self.seen[step] = distance
        super().see_distance(step, distance)


@pytest.mark.parametrize("name", ["wan", "qwen", "ltx", "sd3", "zimage"])
def test_gap_control_is_told_the_distance_in_a_pipeline(name: str) -> None:
    family = present(name)
    pipe = family.make()
    policy = Seeing(GapSettings(tolerance=1e-9), EVEN[:12])
    policy.seen = {}
    put_around(find_targets(pipe), "seeing", lambda _: policy)
    outputs = [each.double() for each in transformer_outputs(family, pipe, steps=12, guidance=4.0)]
    if len(outputs) == 12:  # both in one batch
        order = 1 if name == "zimage" else -1
        pairs = [each.chunk(2)[::order] for each in outputs]
    else:  # cond comes first
        pairs = list(zip(outputs[::2], outputs[1::2], strict=True))
    # Of the run at least 0.85 must be left: of twelve even steps, that is two.
    wanted = {step: apart(*pairs[step]) for step in range(2)}
    assert policy.seen == pytest.approx(wanted, rel=1e-4)


def decisions(fall: float | None, reach: float = 1.0) -> list[Decision]:
    """What gap control decides of a run with even errors whose branches come nearer as exp(-fall·(1 - σ))."""
    gaps = GapControl(GapSettings().in_run_of(STEPS, reach), EVEN)
    found, computed = [], False
    for step in range(STEPS):
        if computed:
            gaps.observe(step - 1, 0.02)
            if fall is not None and gaps.needs_distance(step - 1):
                gaps.see_distance(step - 1, math.exp(-fall * (step - 1) / STEPS))
        found.append(gaps.decide(Position(step, STEPS, step), Tally(), lambda: math.inf))
        computed = found[-1].compute
    return found


def masks(found: list[Decision]) -> list[bool]:
    return [each.compute for each in found]


def test_branches_that_meet_fast_have_more_of_the_early_steps_computed() -> None:
    fast, usual = masks(decisions(20.0)), masks(decisions(None))
    assert sum(fast[:15]) >= sum(usual[:15]) + 3
    assert abs(sum(fast[25:]) - sum(usual[25:])) <= 1, "σ⁵ is little there"


@pytest.mark.parametrize("fall", [-3.0, 0.0, 1.9])
def test_an_error_of_the_start_counts_three_times_at_least(fall: float) -> None:
    assert decisions(fall) == decisions(None)


def test_a_fall_is_how_many_times_more_an_early_error_counts() -> None:
    step = next(at for at, each in enumerate(decisions(12.0)) if not each.compute)
    found = decisions(12.0)[step].change
    gaps = GapControl(GapSettings(early=12.0).in_run_of(STEPS), EVEN)
    for at in range(step + 1):
        if at:
            gaps.observe(at - 1, 0.02)
        decision = gaps.decide(Position(at, STEPS, at), Tally(), lambda: math.inf)
    assert decision.change == pytest.approx(found)


def test_distances_that_tell_nothing_are_passed_over() -> None:
    """Branches that are alike, as with an empty prompt; no numbers; and a fall faster than any that was seen."""
    gaps = GapControl(GapSettings().in_run_of(STEPS), EVEN)
    for step, distance in enumerate([0.0, math.nan, math.inf, 0.5]):
        gaps.see_distance(step, distance)
    assert gaps._early == 0
    gaps.see_distance(4, 0.5 * math.exp(-1.0))
    assert gaps._early == 30
    assert not gaps.needs_distance(8), "less than 0.85 is left"
    assert not GapControl(GapSettings(tolerance=0.0), EVEN).needs_distance(0)


def test_a_run_that_begins_late_has_passed_the_place_where_early_errors_grow() -> None:
    whole, late = (masks(decisions(20.0, reach)) for reach in (1.0, 0.5))
    assert sum(late[:15]) <= sum(whole[:15]) - 3

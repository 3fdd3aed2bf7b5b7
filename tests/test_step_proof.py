"""A step is proved or it is none: pipelines that loop in many ways, each of them seen from the call."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from sgl_diffusion_accel.caching.loop import LoopCall, Unplaced, locate
from test_loop import Pipeline, Probe


class Placed(Probe):
    """Notes the step of each call, or None."""

    def forward(self, latents, timestep=None, prompt=None):
        call = locate(self, (latents, timestep), {"prompt": prompt})
        self.seen.append(call.step if isinstance(call, LoopCall) else None)
        self.missing = call.missing if isinstance(call, Unplaced) else None
        return latents


STEPS = 5


def steps_of(loop, scheduler=None, name="sample"):
    """What is seen of a pipeline whose method is this loop."""
    kind = type("Mine", (Pipeline,), {name: loop})
    pipe = kind(Placed(), scheduler or FlowMatchEulerDiscreteScheduler())
    pipe.scheduler.set_timesteps(STEPS)
    getattr(pipe, name)()
    return pipe.transformer.seen, pipe.transformer.missing


def x(i):
    return torch.zeros(1) + i


# Proved


def by_element(self):
    timesteps = self.scheduler.timesteps
    for moment in timesteps:
        self.transformer(x(0), moment.item())


def by_element_behind_a_bar(self):
    timesteps = self.scheduler.timesteps
    with self.progress_bar(total=len(timesteps)) as bar:
        for _, t in enumerate(timesteps):
            self.transformer(x(0), t.item())
            bar.update()


def by_index_of_an_element(self):
    timesteps = self.scheduler.timesteps
    for k in range(len(timesteps)):
        t = timesteps[k]
        self.transformer(x(0), t.item())


def by_what_is_passed(self):
    timesteps = self.scheduler.timesteps
    for k in range(len(timesteps)):
        self.transformer(x(0), timesteps[k].expand(2))


def by_a_while(self):
    timesteps = self.scheduler.timesteps
    k = 0
    while k < len(timesteps):
        t = timesteps[k]
        self.transformer(x(0), t.item())
        k += 1


def by_value(self):
    timesteps = self.scheduler.timesteps
    for t in timesteps.tolist():
        self.transformer(x(0), t)


def by_counted_value(self):
    timesteps = self.scheduler.timesteps
    for step, t in enumerate(timesteps.tolist()):
        self.transformer(x(step), t)


def by_count(self):
    timesteps = self.scheduler.timesteps
    for step in range(len(timesteps)):
        self.transformer(x(0), float(timesteps[step]))


def by_count_of_steps(self):
    timesteps = self.scheduler.timesteps
    num_inference_steps = len(timesteps)
    for step in range(num_inference_steps):
        self.transformer(x(0), float(timesteps[step]))


def by_pairs_of_sigmas(self):
    timesteps, sigmas = self.scheduler.timesteps, self.scheduler.sigmas
    for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True):  # noqa: RUF007
        self.transformer(x(0), float(sigma - following))
    del timesteps


def by_a_helper(self):
    timesteps = self.scheduler.timesteps

    def predict(self, t):
        return self.transformer(x(0), float(t))

    for t in timesteps:
        predict(self, t)


def by_another_self(this):
    for t in this.scheduler.timesteps:
        this.transformer(x(0), float(t))


@pytest.mark.parametrize(
    "loop",
    [
        by_element,
        by_element_behind_a_bar,
        by_index_of_an_element,
        by_what_is_passed,
        by_a_while,
        by_value,
        by_counted_value,
        by_count,
        by_count_of_steps,
        by_pairs_of_sigmas,
        by_a_helper,
        by_another_self,
    ],
    ids=lambda loop: loop.__name__,
)
def test_step_is_proved(loop):
    loop.__code__ = loop.__code__.replace(co_name="sample")
    assert steps_of(loop)[0] == list(range(STEPS))


# Tiles within a step


def tiles_by_element(self):
    timesteps = self.scheduler.timesteps
    for t in timesteps:
        for i in range(3):
            self.transformer(x(i), float(t))


def tiles_by_value(self):
    timesteps = self.scheduler.timesteps
    for t in timesteps.tolist():
        for i in range(3):
            self.transformer(x(i), t)


@pytest.mark.parametrize("loop", [tiles_by_element, tiles_by_value], ids=lambda loop: loop.__name__)
def test_tiles_are_calls_of_one_step(loop):
    assert steps_of(loop)[0] == [step for step in range(STEPS) for _ in range(3)]


# Not proved


def tiles_by_count(self):
    timesteps = self.scheduler.timesteps
    for step in range(len(timesteps)):
        for i in range(3):
            self.transformer(x(i), float(timesteps[step]))


def tiles_alone(self):
    """The loop over the steps is in another function: `i` counts tiles."""
    timesteps = self.scheduler.timesteps
    for i in range(3):
        self.transformer(x(i), float(timesteps[0]))


def another_range(self):
    timesteps = self.scheduler.timesteps
    segments = 3
    for i in range(segments):
        self.transformer(x(i), float(timesteps[0]))


def from_the_second_on(self):
    timesteps = self.scheduler.timesteps
    for i in range(1, len(timesteps)):
        self.transformer(x(i), float(timesteps[i]))


def left_over(self):
    """`t` is an element, of a loop that is over."""
    timesteps = self.scheduler.timesteps
    for t in timesteps:
        float(t)
    for _ in range(3):
        self.transformer(x(0), 0.0)


def of_two_elements(self):
    timesteps = self.scheduler.timesteps
    for k in range(1, len(timesteps)):
        before, after = timesteps[k - 1], timesteps[k]
        self.transformer(x(0), float(before - after))


def no_variable(self):
    timesteps = self.scheduler.timesteps
    for _ in range(3):
        self.transformer(x(0), float(timesteps[0]))


@pytest.mark.parametrize(
    "loop",
    [tiles_by_count, tiles_alone, another_range, from_the_second_on, left_over, of_two_elements, no_variable],
    ids=lambda loop: loop.__name__,
)
def test_step_that_is_not_proved_is_none(loop):
    seen, missing = steps_of(loop)
    assert len(seen) >= 3
    assert set(seen) == {None}
    assert missing == f"Mine.{loop.__name__} has no variable that proves the step: an element of its timesteps"


def test_whole_timesteps_of_which_one_is_a_count_are_not_told_apart_by_value():
    """DDIM's timesteps are whole numbers, among them 1: a tile's index may be equal to one."""
    assert set(steps_of(tiles_by_value, DDIMScheduler())[0]) == {None}


def test_whole_timesteps_are_told_by_value_where_nothing_else_counts():
    assert steps_of(by_value, DDIMScheduler())[0] == list(range(STEPS))


def test_timesteps_that_repeat_are_not_told_by_value():
    def sample(self):
        timesteps = torch.tensor([3.0, 2.0, 2.0, 1.0])
        for t in timesteps.tolist():
            self.transformer(x(0), t)

    assert steps_of(sample)[0] == [0, None, None, 3]

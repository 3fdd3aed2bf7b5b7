"""A step is proved or it is none: pipelines that loop in many ways, each of them seen from the call."""

from __future__ import annotations

import dis
import importlib
import inspect
import itertools
import pkgutil

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from sgl_diffusion_accel.loop.code_loops import loops_around
from sgl_diffusion_accel.loop.locate import locate
from sgl_diffusion_accel.loop.places import LoopCall, Unplaced
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


def by_a_row_for_all_frames(self):
    """Diffusion forcing in lockstep: a timestep for each frame, and as many rows as there are steps."""
    timesteps = self.scheduler.timesteps
    matrix = torch.stack([t.repeat(3) for t in timesteps])
    for _, t in enumerate(matrix):
        self.transformer(x(0), t.clone()[None])


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
        by_a_row_for_all_frames,
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


def frames_one_after_another(self):
    """Diffusion forcing by turns: more rows than steps, and no step is that of all frames."""
    timesteps = self.scheduler.timesteps
    matrix = torch.stack([t.repeat(3) for t in [timesteps[0], *timesteps]])
    for _, t in enumerate(matrix):
        self.transformer(x(0), t.clone()[None])


def no_variable(self):
    timesteps = self.scheduler.timesteps
    for _ in range(3):
        self.transformer(x(0), float(timesteps[0]))


@pytest.mark.parametrize(
    "loop",
    [
        tiles_by_count,
        tiles_alone,
        another_range,
        from_the_second_on,
        left_over,
        of_two_elements,
        frames_one_after_another,
        no_variable,
    ],
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


# Pipelines of diffusers


def loops_of_diffusers():
    """(pipeline, function, loops around each direct call of its transformer, outermost last)."""
    for module in modules_of_diffusers():
        for name, kind in vars(module).items():
            if not inspect.isclass(kind) or kind.__module__ != module.__name__:
                continue
            for function in vars(kind).values():
                code = getattr(inspect.unwrap(function) if callable(function) else None, "__code__", None)
                if code is None or "timesteps" not in {*code.co_varnames, *code.co_names}:
                    continue
                for loops in calls_of_the_transformer(code):
                    yield name, code.co_name, loops


def modules_of_diffusers():
    for package in (
        "wan",
        "flux",
        "qwenimage",
        "hunyuan_video",
        "ltx",
        "cogvideo",
        "mochi",
        "sana",
        "hidream_image",
    ):
        folder = importlib.import_module(f"diffusers.pipelines.{package}")
        for found in pkgutil.iter_modules(folder.__path__, f"{folder.__name__}."):
            if ".pipeline_" in found.name:
                yield importlib.import_module(found.name)


def calls_of_the_transformer(code):
    instructions = list(dis.get_instructions(code))
    for one, following in itertools.pairwise(instructions):
        is_called = one.opname in ("LOAD_METHOD", "LOAD_ATTR") and one.argval == "transformer"
        if is_called and following.opname in ("LOAD_FAST", "LOAD_CONST", "LOAD_GLOBAL", "CACHE", "PUSH_NULL"):
            yield loops_around(code, one.offset)


def test_loops_of_diffusers_are_understood():
    """The innermost loop around each call of a transformer hands out timesteps, which prove the step."""
    seen = [
        (name, loops[0].targets) for name, function, loops in loops_of_diffusers() if loops and function == "__call__"
    ]
    assert len({name for name, _ in seen}) >= 30
    assert {targets for _, targets in seen} == {("i", "t")}


# Variables that are of another step


def stored_behind_the_call(self):
    timesteps = self.scheduler.timesteps
    for k in range(len(timesteps)):
        self.transformer(x(0), float(timesteps[k]))
        t = timesteps[k]
        float(t)


def stored_at_some_turns(self):
    timesteps = self.scheduler.timesteps
    for k in range(len(timesteps)):
        if k % 2 == 0:
            t = timesteps[k]
        self.transformer(x(0), float(t))


def the_next_one_alone(self):
    timesteps = self.scheduler.timesteps
    for k in range(len(timesteps) - 1):
        t_next = timesteps[k + 1]
        self.transformer(x(0), float(t_next))


def a_helper_with_the_next_one(self):
    timesteps = self.scheduler.timesteps

    def predict(self, t_next):
        return self.transformer(x(0), float(t_next))

    for k in range(len(timesteps) - 1):
        predict(self, timesteps[k + 1])


def a_target_against_what_is_passed(self):
    timesteps = self.scheduler.timesteps
    for k, following in enumerate(timesteps[1:]):
        self.transformer(x(0), timesteps[k].expand(2))
        float(following)


def a_part_of_a_list(self):
    timesteps = self.scheduler.timesteps.tolist()[1:]
    for k in range(len(timesteps)):
        self.transformer(x(0), k)


def as_many_frames_as_steps(self):
    """The loop over the steps is the caller's."""
    frames, timesteps = STEPS, self.scheduler.timesteps
    for i in range(frames):
        self.transformer(x(i), float(timesteps[2]))


def counted_beside_another_element(self):
    num_inference_steps, t = STEPS, self.scheduler.timesteps[2]
    for i in range(num_inference_steps):
        self.transformer(x(i), float(t))


@pytest.mark.parametrize(
    "loop",
    [
        the_next_one_alone,
        a_helper_with_the_next_one,
        a_target_against_what_is_passed,
        a_part_of_a_list,
        as_many_frames_as_steps,
    ],
    ids=lambda loop: loop.__name__,
)
def test_what_is_of_another_step_proves_none(loop):
    seen, _ = steps_of(loop)
    assert len(seen) >= STEPS - 1
    assert set(seen) == {None}


@pytest.mark.parametrize(
    "loop",
    [stored_at_some_turns, stored_behind_the_call, counted_beside_another_element],
    ids=lambda loop: loop.__name__,
)
def test_what_a_count_says_holds_where_no_element_speaks_against_it(loop):
    seen, _ = steps_of(loop)
    assert None in seen
    assert all(step in (None, number) for number, step in enumerate(seen))


# A batch of timesteps


def batch_in_the_loop(self):
    for t in self.scheduler.timesteps:
        timesteps = t.repeat(3)
        for i, one in enumerate(timesteps):
            self.transformer(x(i), one[None])


def batch_of_one(self):
    for t in self.scheduler.timesteps:
        timesteps = t.reshape(1)
        self.transformer(x(0), float(timesteps))


def batch_that_is_expanded(self):
    for t in self.scheduler.timesteps:
        timesteps = t.expand(3)
        for i in range(3):
            self.transformer(x(i), float(timesteps[i]))


@pytest.mark.parametrize(
    "loop", [batch_in_the_loop, batch_of_one, batch_that_is_expanded], ids=lambda each: each.__name__
)
def test_timesteps_of_a_batch_are_not_the_schedule(loop):
    seen, _ = steps_of(loop)
    assert seen == [step for step in range(STEPS) for _ in range(len(seen) // STEPS)]


def test_timesteps_that_a_helper_is_given_for_a_batch_are_not_the_schedule():
    def predict(self, timesteps):
        for i, one in enumerate(timesteps):
            self.transformer(x(i), float(one))

    def sample(self):
        for t in self.scheduler.timesteps:
            predict(self, t.repeat(3))

    seen, _ = steps_of(sample)
    assert set(seen) <= {None, *range(STEPS)}
    assert all(step in (None, i // 3) for i, step in enumerate(seen))


def test_sigmas_of_a_part_of_the_schedule():
    def sample(self):
        timesteps = self.scheduler.timesteps[1:3]
        for sigma in self.scheduler.sigmas[1:3]:
            self.transformer(x(0), float(sigma))
        del timesteps

    assert steps_of(sample)[0] == [0, 1]

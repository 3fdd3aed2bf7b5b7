"""Where in which denoising loop a call is, told from small pipelines of diffusers' own kind."""

from __future__ import annotations

import contextlib
import gc
import threading
import weakref
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from torch import nn

from sgl_diffusion_accel.intercept import intercept
from sgl_diffusion_accel.loop.locate import locate
from sgl_diffusion_accel.loop.places import LoopCall
from sgl_diffusion_accel.loop.runs import Kept, Runs


class Seen(NamedTuple):
    new: bool
    step: int
    total: int
    branch: str


class Probe(nn.Module):
    """A transformer that notes from where it is called."""

    def __init__(self):
        super().__init__()
        self.registry = Runs()
        self.seen = []

    @contextlib.contextmanager
    def cache_context(self, name):
        yield

    def forward(self, latents, timestep=None, prompt=None):
        call = locate(self, (latents, timestep), {"prompt": prompt})
        if not isinstance(call, LoopCall):
            self.seen.append(None)
        else:
            run, new = self.registry.find(call)
            step, branch = run.advance(self, call)
            self.seen.append(Seen(new, step, run.total, branch))
        return latents * 0.5

    @property
    def steps(self):
        return [seen.step for seen in self.seen]

    @property
    def starts(self):
        """How many runs were begun."""
        return sum(seen.new for seen in self.seen)


class Pipeline(DiffusionPipeline):
    """Loops as most pipelines of diffusers do."""

    def __init__(self, transformer, scheduler):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)
        self.set_progress_bar_config(disable=True)

    def __call__(self, steps=4, guidance=False, each=lambda i: None):
        latents = torch.zeros(2, 3)
        prompt_embeds, negative_prompt_embeds = torch.ones(1), torch.zeros(1)
        self.scheduler.set_timesteps(steps)
        timesteps = self.scheduler.timesteps
        with self.progress_bar(total=steps) as progress_bar:
            for i, t in enumerate(timesteps):
                latents = self.transformer(latents, t, prompt=prompt_embeds)
                if guidance:
                    self.transformer(latents, t, prompt=negative_prompt_embeds)
                each(i)
                progress_bar.update()
        return latents


def make(pipeline=Pipeline, probe=None, scheduler=None):
    return pipeline(probe or Probe(), scheduler or FlowMatchEulerDiscreteScheduler())


def test_step_total_and_branch_are_read_from_the_loop():
    pipe = make()
    pipe(3)
    assert pipe.transformer.seen == [Seen(True, 0, 3, "cond"), Seen(False, 1, 3, "cond"), Seen(False, 2, 3, "cond")]


def test_guidance_is_told_apart_by_the_names_of_the_conditioning():
    pipe = make()
    pipe(2, guidance=True)
    assert [(seen.step, seen.branch) for seen in pipe.transformer.seen] == [
        (0, "cond"), (0, "uncond"), (1, "cond"), (1, "uncond"),
    ]  # fmt: skip
    assert pipe.transformer.starts == 1


class AnyOrder(Pipeline):
    def __call__(self, names):
        timesteps = self.scheduler.timesteps
        prompt_embeds, negative_prompt_embeds = torch.ones(1), [torch.ones(1)]
        given = {"cond": prompt_embeds, "uncond": negative_prompt_embeds}
        for i, t in enumerate(timesteps):
            for name in names:
                self.transformer(torch.zeros(1) + i, t, prompt=given[name])


def test_order_of_the_branches_does_not_matter_and_conditioning_may_be_a_list():
    pipe = make(AnyOrder)
    pipe.scheduler.set_timesteps(2)
    pipe(["uncond", "cond"])
    assert [seen.branch for seen in pipe.transformer.seen] == ["uncond", "cond"] * 2


def test_second_call_of_a_branch_within_a_step_is_a_branch_of_its_own():
    pipe = make(AnyOrder)
    pipe.scheduler.set_timesteps(2)
    pipe(["cond", "cond", "uncond"])
    assert [seen.branch for seen in pipe.transformer.seen] == ["cond", "cond#2", "uncond"] * 2
    assert pipe.transformer.steps == [0, 0, 0, 1, 1, 1]


class WithContext(Pipeline):
    def __call__(self, name, **details):
        timesteps = self.scheduler.timesteps
        for i, t in enumerate(timesteps):
            with self.transformer.cache_context(name, **details):
                self.transformer(torch.zeros(1) + i, t)
        return i


@pytest.mark.parametrize(
    ("name", "branch"), [("uncond", "uncond"), ("audio", "audio"), ("pred_cond_skip", "cond_skip")]
)
def test_cache_context_of_the_pipeline_names_the_branch(name, branch):
    pipe = make(WithContext)
    intercept(pipe.transformer, "test", PassOn())
    pipe.scheduler.set_timesteps(2)
    pipe(name)
    assert [seen.branch for seen in pipe.transformer.seen] == [branch, branch]


class PassOn:
    def enter(self, module, args, kwargs):
        return None

    def leave(self, module, token, output):
        return output

    def fail(self, module, token):
        pass


class StepContextProbe(Probe):
    @contextlib.contextmanager
    def cache_context(self, name, step_index=None):
        yield


class StepFromContext(Pipeline):
    def __call__(self):
        timesteps = self.scheduler.timesteps
        for step, t in enumerate(timesteps):
            with self.transformer.cache_context("cond", step_index=step):
                self.transformer(torch.zeros(1), t)


def test_step_index_of_the_cache_context_is_used():
    pipe = make(StepFromContext, StepContextProbe())
    intercept(pipe.transformer, "test", PassOn())
    pipe.scheduler.set_timesteps(3)
    pipe()
    assert pipe.transformer.steps == [0, 1, 2]


class NoIndex(Pipeline):
    def __call__(self, steps=4, calls=2):
        self.scheduler.set_timesteps(steps)
        timesteps = self.scheduler.timesteps
        for t in self.progress_bar(timesteps):
            for _ in range(calls):
                self.transformer(torch.zeros(1), t)


def test_loop_without_an_index_is_followed_by_its_timestep():
    pipe = make(NoIndex)
    pipe(3)
    pipe(3)
    assert pipe.transformer.steps == [0, 0, 1, 1, 2, 2] * 2
    assert pipe.transformer.starts == 2


class StaleIndex(Pipeline):
    def __call__(self, steps):
        self.scheduler.set_timesteps(steps)
        timesteps = self.scheduler.timesteps
        latents = torch.zeros(1)
        for i in range(3):
            latents = latents + i
        for t in timesteps:
            latents = self.transformer(latents, t)


def test_index_left_over_from_another_loop_is_not_the_step():
    pipe = make(StaleIndex)
    pipe(5)
    assert pipe.transformer.steps == [0, 1, 2, 3, 4]
    assert {seen.branch for seen in pipe.transformer.seen} == {"cond"}


class TimestepsOfTheStep(Pipeline):
    """As DiTPipeline: the name `timesteps` holds the step's own timestep, once for each sample."""

    def __call__(self, steps):
        latents = torch.zeros(2, 3)
        self.scheduler.set_timesteps(steps)
        for t in self.progress_bar(self.scheduler.timesteps):
            timesteps = t[None].expand(latents.shape[0])
            latents = self.transformer(latents, timesteps)


def test_timesteps_that_are_given_to_the_model_are_not_the_schedule():
    pipe = make(TimestepsOfTheStep, scheduler=DDIMScheduler())
    pipe(5)
    assert [(seen.step, seen.total) for seen in pipe.transformer.seen] == [(step, 5) for step in range(5)]
    assert pipe.transformer.starts == 1


class Strength(Pipeline):
    def __call__(self, steps, start):
        self.scheduler.set_timesteps(steps)
        timesteps = self.scheduler.timesteps[start:]
        for i, t in enumerate(timesteps):
            self.transformer(torch.zeros(1) + i, t)


def test_part_of_the_schedule_counts_from_its_own_start():
    pipe = make(Strength)
    pipe(10, 6)
    assert [(seen.step, seen.total) for seen in pipe.transformer.seen] == [(0, 4), (1, 4), (2, 4), (3, 4)]


class Segments(Pipeline):
    """Goes through the same timesteps again for each segment of a long video."""

    def __call__(self, steps, segments):
        self.scheduler.set_timesteps(steps)
        timesteps = self.scheduler.timesteps
        for _ in range(segments):
            for i, t in enumerate(timesteps):
                self.transformer(torch.zeros(1) + i, t)


def test_step_back_begins_a_new_run():
    pipe = make(Segments)
    pipe(3, 2)
    assert pipe.transformer.seen[:3] == pipe.transformer.seen[3:]
    assert pipe.transformer.starts == 2


def test_each_call_of_the_pipeline_is_a_new_run():
    pipe = make()
    for steps in (3, 3, 5):
        pipe(steps)
    assert [(seen.new, seen.step, seen.total) for seen in pipe.transformer.seen] == [
        (step == 0, step, total) for total in (3, 3, 5) for step in range(total)
    ]


def test_call_outside_of_any_pipeline_belongs_to_no_loop():
    probe = Probe()
    timesteps = torch.arange(4)
    for i, t in enumerate(timesteps):
        probe(torch.zeros(1) + i, t)
    assert probe.seen == [None] * 4
    assert list(probe.registry) == []


class NoSchedule(DiffusionPipeline):
    def __init__(self, transformer):
        super().__init__()
        self.register_modules(transformer=transformer)

    def __call__(self):
        for i in range(2):
            self.transformer(torch.zeros(1), i)


def test_pipeline_without_a_schedule_is_no_loop():
    pipe = NoSchedule(Probe())
    pipe()
    assert pipe.transformer.seen == [None, None]


class WithHelper(Pipeline):
    """Calls its transformer from a method, which knows neither the index nor the progress bar."""

    def predict(self, latents, t):
        return self.transformer(latents, t)

    def __call__(self, steps):
        self.scheduler.set_timesteps(steps)
        timesteps = self.scheduler.timesteps
        with self.progress_bar(total=steps) as progress_bar:
            for i, t in enumerate(timesteps):
                self.predict(torch.zeros(1) + i, t)
                progress_bar.update()


def test_loop_is_found_through_a_helper_of_the_pipeline():
    pipe = make(WithHelper)
    pipe(3)
    assert [(seen.step, seen.total) for seen in pipe.transformer.seen] == [(0, 3), (1, 3), (2, 3)]


class State:
    def __init__(self, timesteps):
        self.timesteps = timesteps


class ModularBlock:
    """As the denoising blocks of modular pipelines: the loop's variables live in a state object."""

    def __call__(self, components, block_state):
        for i, t in enumerate(block_state.timesteps):
            self.step(components, block_state, i, t)

    def step(self, components, block_state, i, t):
        components.transformer(torch.zeros(1), t)


def test_loop_of_a_modular_pipeline_is_found():
    components = SimpleNamespace(transformer=Probe(), scheduler=FlowMatchEulerDiscreteScheduler())
    components.scheduler.set_timesteps(3)
    state = State(components.scheduler.timesteps)
    ModularBlock()(components, state)
    assert [(seen.step, seen.total) for seen in components.transformer.seen] == [(0, 3), (1, 3), (2, 3)]
    assert len(list(components.transformer.registry)) == 1
    del state
    assert list(components.transformer.registry) == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_run_after_an_error_is_a_new_one(error):
    pipe = make()

    def stop(i):
        if i == 1:
            raise error

    with contextlib.suppress(error):
        pipe(4, each=stop)
    pipe(4)
    assert [(seen.new, seen.step) for seen in pipe.transformer.seen] == [
        (True, 0), (False, 1), (True, 0), (False, 1), (False, 2), (False, 3),
    ]  # fmt: skip


def test_run_is_forgotten_when_its_loop_ends():
    pipe = make()
    alive = []
    pipe(3, each=lambda _: alive.append(len(list(pipe.transformer.registry))))
    assert alive == [1, 1, 1]
    assert list(pipe.transformer.registry) == []


def test_run_is_forgotten_after_an_error_though_the_schedule_lives_on():
    pipe = make()

    def stop(i):
        raise RuntimeError

    with contextlib.suppress(RuntimeError):
        pipe(3, each=stop)
    gc.collect()
    assert pipe.scheduler.timesteps is not None
    assert list(pipe.transformer.registry) == []


class Tensors(Kept):
    def __init__(self, tensor):
        self.tensor = tensor

    def nbytes(self):
        return self.tensor.nbytes


def test_what_is_kept_for_a_run_is_let_go_with_it():
    pipe, kept = make(), []

    def keep(i):
        (run,) = pipe.transformer.registry
        if i == 0:
            run.kept = Tensors(torch.zeros(3))
            kept.append(weakref.ref(run.kept.tensor))
        assert kept[0]() is not None

    pipe(3, each=keep)
    assert kept[0]() is None


def test_discard_and_clear_forget_runs_and_what_is_kept_for_them():
    pipe = make()

    def discard(i):
        (run,) = pipe.transformer.registry
        run.kept = Tensors(torch.zeros(3))
        pipe.transformer.registry.discard(run) if i == 0 else pipe.transformer.registry.clear()
        assert list(pipe.transformer.registry) == []
        assert run.kept is None

    pipe(3, each=discard)
    assert [(seen.new, seen.step) for seen in pipe.transformer.seen] == [(True, 0), (True, 1), (True, 2)]


def test_pipeline_that_runs_inside_another_one_has_its_own_run():
    probe = Probe()
    outer, inner = make(probe=probe), make(probe=probe)
    outer(3, each=lambda i: inner(2) if i == 1 else None)
    assert [(seen.new, seen.step, seen.total) for seen in probe.seen] == [
        (True, 0, 3), (False, 1, 3), (True, 0, 2), (False, 1, 2), (False, 2, 3),
    ]  # fmt: skip


def test_inner_pipeline_that_tells_less_is_not_taken_for_the_outer_one():
    """It has no index and no progress bar among its variables; the pipeline around it has both."""
    probe = Probe()
    outer, inner = make(probe=probe), make(NoIndex, probe=probe)
    outer(3, each=lambda i: inner(2, calls=1) if i == 1 else None)
    assert [(seen.new, seen.step, seen.total) for seen in probe.seen] == [
        (True, 0, 3), (False, 1, 3), (True, 0, 2), (False, 1, 2), (False, 2, 3),
    ]  # fmt: skip


def test_runs_of_two_threads_that_share_a_transformer_are_apart():
    probe, barrier, together = Probe(), threading.Barrier(2, timeout=30), []

    def wait(i):
        if i < 4:
            barrier.wait()
            together.append(sorted(run.total for run in probe.registry))
            barrier.wait()

    threads = [threading.Thread(target=make(probe=probe), args=(steps,), kwargs={"each": wait}) for steps in (4, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == [[4, 5]] * 8
    for total in (4, 5):
        seen = [(seen.new, seen.step) for seen in probe.seen if seen.total == total]
        assert seen == [(step == 0, step) for step in range(total)]


class Scratch(Pipeline):
    def __call__(self):
        self.scheduler.set_timesteps(3)
        timesteps = self.scheduler.timesteps
        freed = []
        for i, t in enumerate(timesteps):
            scratch = torch.zeros(5)
            reference = weakref.ref(scratch)
            self.transformer(torch.zeros(1) + i, t)
            del scratch
            freed.append(reference() is None)
        return freed


def test_locals_of_the_loop_are_not_kept_alive():
    assert make(Scratch)() == [True, True, True]


def test_a_caller_s_own_snapshot_of_its_locals_is_left_alone():
    class Caller:
        def call(self, pipe):
            i = 7
            snapshot = locals()
            pipe(i, 3)
            return snapshot

    assert Caller().call(make(Strength))["i"] == 7


class Sigmas(Pipeline):
    def __call__(self, steps, start=0):
        self.scheduler.set_timesteps(steps)
        timesteps = self.scheduler.timesteps[start:]
        result = []
        for i, t in enumerate(timesteps):
            self.transformer(torch.zeros(1), t)
            (run,) = self.transformer.registry
            result.append(run.sigmas()[i])
        return result


@pytest.mark.parametrize("start", [0, 3, 7])
def test_sigmas_are_the_scheduler_s_at_each_step_of_the_run(start):
    pipe = make(Sigmas, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))
    assert pipe(8, start) == pytest.approx(pipe.scheduler.sigmas[start:-1].tolist())


def test_sigmas_of_a_second_order_scheduler_have_one_for_each_call():
    pipe = make(Sigmas, scheduler=FlowMatchHeunDiscreteScheduler())
    sigmas = pipe(4)
    expected = [float(t) / 1000 for t in pipe.scheduler.timesteps]
    assert sigmas == pytest.approx(expected, abs=1e-4)


def test_scheduler_without_sigmas_gives_its_timesteps():
    pipe = make(Sigmas, scheduler=DDIMScheduler())
    assert pipe(4) == [float(t) for t in pipe.scheduler.timesteps]

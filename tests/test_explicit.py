"""Loops that say themselves where they are, of every shape that Python has for them."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tqdm import tqdm

from sgl_diffusion_accel import ConfigError, ConfigTypeError, branch, denoising_steps
from sgl_diffusion_accel.intercept import intercept
from sgl_diffusion_accel.loop.explicit import loops_entered
from sgl_diffusion_accel.loop.locate import locate
from sgl_diffusion_accel.loop.places import LoopCall
from test_loop import PassOn, Pipeline, Probe, Seen, make

X = torch.zeros(1)


@pytest.fixture
def scheduler():
    made = FlowMatchEulerDiscreteScheduler()
    made.set_timesteps(4)
    return made


@pytest.fixture(autouse=True)
def no_loop_is_left():
    yield
    gc.collect()
    assert loops_entered() == []


def four(branch="cond"):
    return [Seen(step == 0, step, 4, branch) for step in range(4)]


# Shapes of loops


def test_for(scheduler):
    probe = Probe()
    given = []
    for t in denoising_steps(scheduler.timesteps):
        probe(X, t)
        given.append(float(t))
    assert probe.seen == four()
    assert given == scheduler.timesteps.tolist()
    assert list(probe.registry) == []


def test_what_the_loop_was_told_reaches_the_patches(scheduler):
    seen = []

    class Module(torch.nn.Module):
        def forward(self):
            seen.append(locate(self, (), {}))

    for _ in denoising_steps(scheduler.timesteps, scheduler, 4, boundary=500.0):
        Module()()
    assert {(call.scheduler, call.guidance, call.boundary) for call in seen} == {(scheduler, 4.0, 500.0)}
    assert all(call.timesteps is scheduler.timesteps for call in seen)


@pytest.mark.parametrize(
    "around",
    [
        enumerate,
        tqdm,
        lambda steps: tqdm(enumerate(steps), disable=True),
        lambda steps: enumerate(tqdm(steps, disable=True)),
        lambda steps: zip(range(4), steps, strict=True),
        lambda steps: (t for t in steps),
    ],
    ids=["enumerate", "tqdm", "tqdm of enumerate", "enumerate of tqdm", "zip", "generator expression"],
)
def test_what_passes_the_steps_on_does_not_matter(scheduler, around, capsys):
    probe = Probe()
    for turn in around(denoising_steps(scheduler.timesteps)):
        probe(X, turn)
    assert probe.seen == four()


def test_list_of_numbers():
    probe = Probe()
    for t in denoising_steps([1.0, 0.75, 0.5, 0.25]):
        assert type(t) is float
        probe(X, t)
    assert probe.seen == four()


def test_each_for_is_a_run_of_its_own(scheduler):
    probe = Probe()
    steps = denoising_steps(scheduler.timesteps)
    for _ in range(2):
        for t in steps:
            probe(X, t)
    assert probe.seen == four() * 2


@pytest.mark.parametrize("leave", ["break", "error", "return"])
def test_loop_that_is_left_early_is_over(scheduler, leave):
    probe = Probe()

    def run():
        for step, t in enumerate(denoising_steps(scheduler.timesteps)):
            probe(X, t)
            if step == 1:
                if leave == "error":
                    raise RuntimeError
                if leave == "return":
                    return
                break
        assert loops_entered() == []

    for _ in range(2):
        with contextlib.suppress(RuntimeError):
            run()
        assert list(probe.registry) == []
        probe(X)
    assert probe.seen == [*four()[:2], None] * 2


def test_call_before_and_after_the_loop_belongs_to_none(scheduler):
    probe = Probe()
    steps = denoising_steps(scheduler.timesteps)
    probe(X)
    for t in steps:
        probe(X, t)
    probe(X)
    assert probe.seen == [None, *four(), None]


def test_loop_in_a_class_that_is_stepped_from_outside(scheduler):
    class Sampler:
        def __init__(self, probe):
            self.probe = probe
            self.steps = iter(denoising_steps(scheduler.timesteps))

        def advance(self):
            self.t = next(self.steps)

        def predict(self):
            self.probe(X)

    sampler = Sampler(Probe())
    for _ in range(4):
        sampler.advance()
        sampler.predict()
    assert sampler.probe.seen == four()


def test_function_in_the_loop_need_not_know_of_it(scheduler):
    probe = Probe()

    def predict():
        return probe(X)

    for _ in denoising_steps(scheduler.timesteps):
        predict()
    assert probe.seen == four()


def test_nested_loops_are_apart(scheduler):
    probe = Probe()
    inner = [0.5, 0.25]
    for _ in denoising_steps(scheduler.timesteps):
        probe(X)
        for _ in denoising_steps(inner):
            probe(X)
        probe(X)
    assert [(seen.step, seen.total) for seen in probe.seen[:4]] == [(0, 4), (0, 2), (1, 2), (0, 4)]
    assert [seen.branch for seen in probe.seen[:4]] == ["cond", "cond", "cond", "cond#2"]
    assert [seen.step for seen in probe.seen if seen.total == 4] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert probe.starts == 5


# Generators, which stop in mid-loop


def sampler(probe, timesteps, name):
    for _ in denoising_steps(timesteps):
        with branch(name):
            probe(X)
        yield
        probe(X)


def test_generators_that_take_turns_are_apart(scheduler):
    probe = Probe()
    for _ in zip(sampler(probe, scheduler.timesteps, "a"), sampler(probe, [3.0, 2.0, 1.0], "b"), strict=False):
        pass
    for total, name in ((4, "a"), (3, "b")):
        mine = [(seen.step, seen.branch) for seen in probe.seen if seen.total == total]
        steps = range(4) if total == 4 else range(3)
        assert mine == [(step, each) for step in steps for each in (name, "cond")][: len(mine)]
        assert len(mine) >= 6


def test_who_waits_for_a_generator_is_in_no_loop_of_it(scheduler):
    probe, other = Probe(), Probe()
    for _ in sampler(probe, scheduler.timesteps, "a"):
        other(X)
    assert other.seen == [None] * 4
    assert len(probe.seen) == 8


# Threads and tasks


def test_threads_are_apart(scheduler):
    probe, barrier = Probe(), threading.Barrier(4, timeout=30)

    def run(total):
        for step, _ in enumerate(denoising_steps([float(total - i) for i in range(total)])):
            if step < 4:  # together, as long as all of them are there
                barrier.wait()
            probe(X)

    threads = [threading.Thread(target=run, args=(4 + i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for total in range(4, 8):
        assert [seen.step for seen in probe.seen if seen.total == total] == list(range(total))


def test_call_in_a_worker_thread_needs_the_context(scheduler):
    probe = Probe()
    with ThreadPoolExecutor(1) as pool:
        for _ in denoising_steps(scheduler.timesteps):
            pool.submit(probe, X).result()
            pool.submit(contextvars.copy_context().run, probe, X).result()
    assert probe.seen == [each for seen in four() for each in (None, seen)]


def test_tasks_are_apart(scheduler):
    probe = Probe()

    async def predict():
        await asyncio.sleep(0)
        probe(X)
        await asyncio.to_thread(probe, X)

    async def run(total):
        for _ in denoising_steps([float(total - i) for i in range(total)]):
            await predict()

    async def both():
        await asyncio.gather(run(4), run(6))

    asyncio.run(both())
    for total in (4, 6):
        mine = [(seen.step, seen.branch) for seen in probe.seen if seen.total == total]
        assert mine == [(step, each) for step in range(total) for each in ("cond", "cond#2")]


# Beside pipelines


def test_pipeline_that_runs_inside_a_loop_of_one_s_own_has_its_own_run():
    pipe = make()
    for _ in denoising_steps([2.0, 1.0]):
        pipe(3)
    assert [(seen.step, seen.total) for seen in pipe.transformer.seen] == [(0, 3), (1, 3), (2, 3)] * 2


class OwnMethod(Pipeline):
    """A pipeline's method that says where it is, and whose helper looks at the schedule."""

    def predict(self, latents, t):
        timesteps = self.scheduler.timesteps
        assert len(timesteps)
        return self.transformer(latents, t)

    def sample(self):
        timesteps = self.scheduler.timesteps
        for t in denoising_steps(timesteps, scheduler=self.scheduler):
            with branch("mine"):
                self.predict(X, t)


def test_own_loop_in_a_method_of_a_pipeline_goes_before_what_is_read():
    pipe = make(OwnMethod)
    pipe.scheduler.set_timesteps(4)
    pipe.sample()
    assert pipe.transformer.seen == four("mine")


class Branching(Pipeline):
    def sample(self):
        timesteps = self.scheduler.timesteps
        for t in timesteps:
            for name in ("left", "right"):
                with branch(name):
                    self.transformer(X, t)


def test_branch_names_the_calls_of_a_pipeline_s_own_method():
    pipe = make(Branching)
    pipe.scheduler.set_timesteps(2)
    with branch("around"):  # entered outside of the loop, it names none of its calls
        pipe.sample()
    assert [seen.branch for seen in pipe.transformer.seen] == ["left", "right"] * 2


def test_branch_around_a_pipeline_does_not_mix_its_branches():
    pipe = make()
    with branch("mine"):
        pipe(2, guidance=True)
    assert [seen.branch for seen in pipe.transformer.seen] == ["cond", "uncond"] * 2


# Branches


def test_branches_in_any_order_and_in_context_managers_of_one_s_own(scheduler):
    probe = Probe()

    @contextlib.contextmanager
    def guided(name):
        with branch(name):
            yield

    for t in denoising_steps(scheduler.timesteps):
        for name in ("uncond", "cond") if float(t) > 600 else ("cond", "uncond"):
            with guided(name):
                probe(X)
    assert [(seen.step, seen.branch) for seen in probe.seen[:2]] == [(0, "uncond"), (0, "cond")]
    assert [(seen.step, seen.branch) for seen in probe.seen[-2:]] == [(3, "cond"), (3, "uncond")]


def test_cache_context_of_the_model_counts_before_a_branch_around_it(scheduler):
    probe = Probe()
    intercept(probe, "test", PassOn())
    for _ in denoising_steps(scheduler.timesteps):
        with branch("outer"), probe.cache_context("inner"):
            probe(X)
        with branch("outer"), branch("nested"):
            probe(X)
    assert [seen.branch for seen in probe.seen] == ["inner", "nested"] * 4


def test_branch_ends_with_its_block_also_on_an_error(scheduler):
    probe = Probe()
    for _ in denoising_steps(scheduler.timesteps):
        with contextlib.suppress(ValueError), branch("other"):
            raise ValueError
        probe(X)
    assert probe.seen == four()


def test_two_calls_of_a_name_are_told_apart_by_what_they_are_given(scheduler):
    probe = Probe()
    one, other = torch.ones(1), torch.ones(1)
    for step, _ in enumerate(denoising_steps(scheduler.timesteps)):
        for prompt in (one, other) if step % 2 == 0 else (other, one):
            probe(X, prompt=prompt)
    assert [seen.branch for seen in probe.seen[:4]] == ["cond", "cond#2", "cond#2", "cond"]


# Errors


@pytest.mark.parametrize(
    ("timesteps", "error", "match"),
    [
        (torch.zeros(2, 2), ConfigTypeError, r"shape \[2, 2\].*scheduler.timesteps"),
        (torch.zeros(0), ConfigError, "timesteps is empty"),
        ([], ConfigError, "timesteps is empty"),
        (["a"], ConfigTypeError, "no number"),
        ("timesteps", ConfigTypeError, "timesteps is a str"),
        (iter([1.0]), ConfigTypeError, r"denoising_steps\(list\(timesteps\)\)"),
        (7, ConfigTypeError, "timesteps is a int"),
        (FlowMatchEulerDiscreteScheduler(), ConfigTypeError, "timesteps is a scheduler.*scheduler.timesteps"),
    ],
)
def test_timesteps_that_are_none(timesteps, error, match):
    with pytest.raises(error, match=match):
        denoising_steps(timesteps)


def test_scheduler_without_a_step_and_one_that_has_fewer_timesteps(scheduler):
    with pytest.raises(ConfigTypeError, match="scheduler is a float"):
        denoising_steps(scheduler.timesteps, 4.0)
    with pytest.raises(ConfigError, match=r"9 timesteps, and the scheduler has 4.*set_timesteps\(9\)"):
        denoising_steps(torch.arange(9.0), scheduler)


@pytest.mark.parametrize("name", ["guidance", "boundary"])
def test_scales_are_finite_numbers(scheduler, name):
    for wrong, error in (("4", ConfigTypeError), (True, ConfigTypeError), (float("nan"), ConfigError)):
        with pytest.raises(error, match=name):
            denoising_steps(scheduler.timesteps, **{name: wrong})


def test_names_of_branches():
    with pytest.raises(ConfigTypeError, match="a int; allowed: a string"):
        branch(1)
    with pytest.raises(ConfigError, match="is empty"):
        branch(" ")


def test_length_is_that_of_the_timesteps(scheduler):
    assert len(denoising_steps(scheduler.timesteps)) == 4


def test_call_when_the_steps_are_used_up_is_not_placed(scheduler):
    steps = iter(denoising_steps(scheduler.timesteps))
    for _ in steps:
        pass
    with pytest.raises(StopIteration):
        next(steps)
    assert not isinstance(locate(Probe(), (), {}), LoopCall)


# Where a loop and a branch stand


def test_branch_of_a_generator_that_has_stopped_is_not_that_of_others(scheduler):
    """Two generators, each a branch, are asked in changing order."""
    probe = Probe()

    def guided(name):
        while True:
            with branch(name):
                probe(X)
                yield

    cond, uncond = guided("cond"), guided("uncond")
    for t in denoising_steps(scheduler.timesteps):
        for each in (cond, uncond) if float(t) > 600 else (uncond, cond):
            next(each)
        probe(X)
    assert [seen.branch for seen in probe.seen[:3]] == ["cond", "uncond", "cond#2"]
    assert [seen.branch for seen in probe.seen[-3:]] == ["uncond", "cond", "cond#2"]


class Guided:
    """A context manager of one's own that enters a branch."""

    def __init__(self, name):
        self.branch = branch(name)

    def __enter__(self):
        return self.branch.__enter__()

    def __exit__(self, *error):
        self.branch.__exit__(*error)


class ByOtherMeans(Pipeline):
    def sample(self):
        timesteps = self.scheduler.timesteps
        for t in timesteps:
            with contextlib.ExitStack() as stack:
                stack.enter_context(branch("left"))
                self.transformer(X, t)
            with Guided("right"):
                self.transformer(X, t)


def test_branch_may_be_entered_by_other_means():
    pipe = make(ByOtherMeans)
    pipe.scheduler.set_timesteps(2)
    pipe.sample()
    assert [seen.branch for seen in pipe.transformer.seen] == ["left", "right"] * 2


def test_async_generator_that_has_stopped_is_no_loop_of_who_consumes_it(scheduler):
    probe, other = Probe(), Probe()

    async def sampler():
        for t in denoising_steps(scheduler.timesteps):
            probe(X)
            yield t

    async def consume():
        async for t in sampler():
            other(X, t)

    asyncio.run(consume())
    assert probe.seen == four()
    assert other.seen == [None] * 4


def test_loop_that_is_stepped_by_a_function_does_not_take_the_calls_of_a_pipeline():
    """The frame of that function is gone, and its identity may be that of another one by now."""
    pipe = make()
    steps = iter(denoising_steps([float(i) for i in range(40, 0, -1)]))

    def advance(it):
        return next(it)

    for _ in range(40):
        advance(steps)
        pipe.transformer.seen.clear()
        pipe(3)
        assert [(seen.step, seen.total) for seen in pipe.transformer.seen] == [(0, 3), (1, 3), (2, 3)]


def test_loop_that_is_kept_and_given_up_does_not_take_later_calls(scheduler):
    probe = Probe()

    class Sampler:
        def advance(self):
            self.t = next(self.steps)

        def predict(self):
            probe(X)

    sampler = Sampler()
    sampler.steps = iter(denoising_steps(scheduler.timesteps))
    sampler.advance()
    sampler.predict()

    def untold():
        for t in scheduler.timesteps:
            probe(X, t)

    untold()
    assert probe.seen[0] == Seen(True, 0, 4, "cond")
    assert probe.seen[1:] == [None] * 4


def test_loop_that_was_left_does_not_take_the_calls_of_functions_that_are_called_later(scheduler):
    probe = Probe()
    steps = iter(denoising_steps(scheduler.timesteps))
    for _ in range(2):
        next(steps)
        probe(X)
        probe(X)

    def untold():
        for t in scheduler.timesteps:
            probe(X, t)

    untold()
    assert [seen.step for seen in probe.seen[:4]] == [0, 0, 1, 1]
    assert [seen is not None for seen in probe.seen[4:]] == [True, False, False, False]


def test_loops_side_by_side_are_told_apart_by_what_is_given(scheduler):
    probe = Probe()
    own = [torch.tensor([4.0, 3.0, 2.0, 1.0]), torch.tensor([40.0, 30.0, 20.0, 10.0])]
    for one, other in zip(denoising_steps(own[0]), denoising_steps(own[1]), strict=True):
        probe(X, other)
        probe(X, one)
        probe(X)
    assert [None if seen is None else seen.step for seen in probe.seen[3:]] == [1, 1, None, 2, 2, None, 3, 3, None]


def test_pairs_of_steps_are_at_the_first_of_both(scheduler):
    probe = Probe()
    for t, following in itertools.pairwise(denoising_steps(scheduler.timesteps)):
        probe(X, t - following)
    assert probe.steps == [0, 1, 2]


def test_timestep_that_is_given_another_shape_behind_a_progress_bar(scheduler, capsys):
    def bar_of_one_s_own(steps):
        for step in steps:  # noqa: UP028
            yield step

    probe = Probe()
    for around in (tqdm, bar_of_one_s_own):
        for t in around(denoising_steps(scheduler.timesteps)):
            t = t.expand(1)
            probe(X, t)
    assert probe.seen == four() * 2


def test_prompt_that_was_not_seen_before_does_not_take_the_branch_of_another(scheduler):
    """Guidance begins in mid-run, and its branch comes first then."""
    probe = Probe()
    cond, uncond = torch.ones(1), torch.zeros(1)
    for step, _ in enumerate(denoising_steps(scheduler.timesteps)):
        for prompt in (cond,) if step < 2 else (uncond, cond):
            probe(X, prompt=prompt)
    assert [seen.branch for seen in probe.seen] == ["cond", "cond", "cond#2", "cond", "cond#2", "cond"]


def test_part_of_a_schedule_begins_where_it_begins(scheduler):
    probe = Probe()
    for t in denoising_steps(scheduler.timesteps[1:3], scheduler=scheduler):
        probe(X, t)
        (run,) = probe.registry
        assert run.first == 1
        assert run.sigmas() == pytest.approx(scheduler.sigmas[1:3].tolist())


@pytest.mark.parametrize(
    ("timesteps", "error", "match"),
    [
        ([1.0, float("nan")], ConfigError, "not finite"),
        (torch.tensor([float("inf")]), ConfigError, "not finite"),
        (["1", "0.5"], ConfigTypeError, "'1', which is no number"),
        ([True, False], ConfigTypeError, "True, which is no number"),
        (torch.ones(3, dtype=torch.complex64), ConfigTypeError, "complex64"),
        ({1: 2.0}, ConfigTypeError, "is a dict"),
        (make(), ConfigTypeError, "is a Pipeline"),
    ],
)
def test_other_timesteps_that_are_none(timesteps, error, match):
    with pytest.raises(error, match=match):
        denoising_steps(timesteps)


def test_class_of_a_scheduler_is_no_scheduler(scheduler):
    with pytest.raises(ConfigTypeError, match="class, FlowMatchEulerDiscreteScheduler"):
        denoising_steps(scheduler.timesteps, FlowMatchEulerDiscreteScheduler)


def test_list_that_changes_later_is_the_one_that_was_given():
    given = [3.0, 2.0, 1.0]
    steps = denoising_steps(given)
    given.append(0.0)
    assert list(steps) == [3.0, 2.0, 1.0]

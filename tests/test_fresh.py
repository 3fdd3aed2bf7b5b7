"""A run never sees what happened before it, beside it or inside it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch

from invariants import (
    CACHES,
    Apply,
    Interrupted,
    check_unaffected,
    cross,
    failing_at,
    families,
    family,
    family_params,
    fresh_output,
    in_matrix,
    skips_some,
)
from invariants.caches import WHOLE_CALLS
from invariants.families import present
from sgl_diffusion_accel import CachePatch
from zoo import Family, tensor_of
from zoo.base import flow_euler, unipc_flow

REUSE, TAYLOR, TEACACHE = CACHES["reuse"], CACHES["taylor"], CACHES["teacache"]
STEPS = 6


def cached(cache: str, *names: str, teacache: tuple[str, ...] = ("wan", "flux")) -> Any:
    """Parametrises a test over families under a cache, and over some under TeaCache, one for each of its signals.

    The caches of whole calls, MagCache and gap control join on the first family.
    """
    return pytest.mark.parametrize(("family", "apply"), cached_params(cache, *names, teacache=teacache))


def cached_params(cache: str, *names: str, teacache: tuple[str, ...] = ("wan", "flux")) -> list[Any]:
    """The same as a list of parameters: two families, both signals and every cache by default."""
    cases = [*((name, cache) for name in names), *((name, "teacache") for name in teacache)]
    cases += [(names[0], kind) for kind in ("magcache", "gap control", *WHOLE_CALLS)]
    default = {(name, cache) for name in names[:2]} | {(name, "teacache") for name in teacache[:2]}
    params = []
    for name, kind in cases:
        param = pytest.param(*family(name).values, CACHES[kind], id=f"{name}-{kind}", marks=family(name).marks)
        params.append(param if kind not in (cache, "teacache") or (name, kind) in default else in_matrix(param))
    return params


@cross(
    "family, place, error",
    family_params("wan", "flux"),
    ["block", "scheduler", "callback"],
    [Interrupted, KeyboardInterrupt],
)
def test_run_after_an_error(family: Family, place: str, error: type[BaseException]) -> None:
    check_unaffected(family, TAYLOR, lambda pipe: failing_at(family, pipe, place, error))


@cached("taylor", "wan22", "qwen", "hunyuan", teacache=("wan", "wan22", "flux", "qwen"))
def test_run_after_an_error_on_other_families(family: Family, apply: Apply) -> None:
    check_unaffected(family, apply, lambda pipe: failing_at(family, pipe, "callback", KeyboardInterrupt, 4))


@cached("taylor", "wan", "qwen", "sd3", teacache=("wan", "qwen"))
def test_run_after_an_interrupt(family: Family, apply: Apply) -> None:
    def interrupt(pipe: Any) -> None:
        def stop(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            pipe._interrupt = step == 2
            return values

        family.run(pipe, seed=5, callback_on_step_end=stop)

    check_unaffected(family, apply, interrupt)


@cross(
    "family, apply, between",
    cached_params("reuse", "wan", "flux", "zimage"),
    ["more steps", "seed", "batch", "size", "fewer steps"],
)
def test_run_after_another_call(family: Family, apply: Apply, between: str) -> None:
    other: dict[str, dict[str, Any]] = {
        "seed": {"seed": 5},
        "batch": {"batch": 2},
        "size": {"size": family.other_size},
        "fewer steps": {"steps": 3},
        "more steps": {"steps": 9},
    }
    check_unaffected(family, apply, lambda pipe: family.run(pipe, **other[between]))
    # and the other way round: the unusual call second
    if between != "fewer steps":
        check_unaffected(family, apply, family.run, **other[between])


@cached("reuse", "wan", "qwen", "lumina2", "zimage", "sd3", "hunyuan", teacache=("wan", "qwen", "zimage"))
def test_run_after_other_guidance(family: Family, apply: Apply) -> None:
    assert family.other_guidance is not None
    guidance = family.other_guidance[0]
    check_unaffected(family, apply, lambda pipe: family.run(pipe, guidance=guidance))
    check_unaffected(family, apply, family.run, guidance=guidance)


@cached("taylor", "wan", teacache=("wan",))
def test_run_after_another_dtype(family: Family, apply: Apply) -> None:
    def in_float64(pipe: Any) -> None:
        pipe.transformer.to(torch.float64)
        given = family.call(pipe).items()
        family.run(pipe, **{k: v.double() for k, v in given if isinstance(v, torch.Tensor) and v.is_floating_point()})
        pipe.transformer.to(torch.float32)

    check_unaffected(family, apply, in_float64)


@cached("taylor", "wan", "flux", "zimage")
def test_run_after_another_scheduler(family: Family, apply: Apply) -> None:
    def with_others(pipe: Any) -> None:
        own = pipe.scheduler
        for pipe.scheduler in others:
            family.run(pipe)
        pipe.scheduler = own

    others = [unipc_flow(), flow_euler(shift=7.0)] if family.name == "wan" else [flow_euler(shift=7.0)]
    check_unaffected(family, apply, with_others)


@cached("reuse", "wan", "flux", "zimage", "sd3")
def test_run_after_a_bare_call(family: Family, apply: Apply) -> None:
    check_unaffected(family, apply, lambda pipe: _bare(family, pipe))


def _bare(family: Family, pipe: Any, **kw: Any) -> torch.Tensor:
    with torch.no_grad():
        return tensor_of(pipe.transformer(**family.bare(pipe, **kw))[0]).clone()


@families("wan", "flux", "zimage", "sd3")
def test_bare_calls_are_computed_in_full(family: Family) -> None:
    expected = _bare(family, family.make())
    pipe = family.make()
    patch = REUSE(pipe)
    for _ in range(3):
        assert torch.equal(_bare(family, pipe), expected)
    assert patch.stats.outside == 3
    assert not patch.stats.runs
    assert patch.held_bytes() == 0
    family.run(pipe)
    assert torch.equal(_bare(family, pipe), expected)
    assert patch.stats.outside == 4
    assert len(patch.stats.runs) == 1


def each_step(do: Callable[[int], None]) -> Callable[..., dict[str, Any]]:
    """A `callback_on_step_end` that does something."""

    def callback(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        do(step)
        return values

    return callback


@cached("reuse", "wan", "flux", "zimage")
def test_bare_calls_from_a_callback_are_computed_in_full(family: Family, apply: Apply) -> None:
    expected = fresh_output(family, apply)
    plain = family.make()
    pipe = family.make()
    patch = apply(pipe)
    bare: list[tuple[torch.Tensor, torch.Tensor]] = []
    callback = each_step(lambda step: bare.append((_bare(family, pipe, seed=step), _bare(family, plain, seed=step))))
    output = family.run(pipe, callback_on_step_end=callback)
    assert torch.equal(output, expected)
    assert all(torch.equal(ours, full) for ours, full in bare)
    assert patch.stats.outside == STEPS


@cached("taylor", "wan", "zimage")
def test_second_instance_runs_in_between(family: Family, apply: Apply) -> None:
    expected = [fresh_output(family, apply, seed=seed) for seed in (0, 1)]
    pipe, other = family.make(), family.make()
    apply(pipe), apply(other)
    inner: list[torch.Tensor] = []
    output = family.run(pipe, callback_on_step_end=each_step(lambda _: inner.append(family.run(other, seed=1))))
    assert torch.equal(output, expected[0])
    assert len(inner) == STEPS
    assert all(torch.equal(one, expected[1]) for one in inner)


def shared(first: str, second: str) -> tuple[Family, Any, Family, Any]:
    """A pipeline, and another of its own scheduler around the same transformer."""
    family, other = present(first), present(second)
    pipe = family.make()
    sharing = other.make()
    sharing.transformer = pipe.transformer
    return family, pipe, other, sharing


PAIRS = [("wan", "wan"), ("wan", "wan_v2v"), ("wan_v2v", "wan"), ("flux", "flux_img2img"), ("flux_img2img", "flux")]
TEACACHE_PAIRS = [
    (*PAIRS[1], TEACACHE),
    (*PAIRS[3], TEACACHE),
    *((*PAIRS[1], CACHES[name]) for name in ("magcache", "gap control", *WHOLE_CALLS)),
]


EVERY_PAIR = [
    *((*PAIRS[index], REUSE) for index in (1, 3)),
    *(pytest.param(*PAIRS[index], REUSE, marks=pytest.mark.matrix) for index in (0, 2, 4)),
    *TEACACHE_PAIRS,
]


@pytest.mark.parametrize(("first", "second", "apply"), EVERY_PAIR)
def test_shared_transformer_in_turn(first: str, second: str, apply: Apply) -> None:
    family, pipe, other, sharing = shared(first, second)
    expected, sharing_expected = fresh_output(family, apply), fresh_output(other, apply, seed=1)
    patch = apply(pipe)
    for _ in range(2):
        assert torch.equal(family.run(pipe), expected)
        assert torch.equal(other.run(sharing, seed=1), sharing_expected)
    assert len(patch.stats.runs) == 4
    assert skips_some(patch)


@pytest.mark.parametrize(("first", "second", "apply"), EVERY_PAIR)
def test_shared_transformer_nested(first: str, second: str, apply: Apply) -> None:
    family, pipe, other, sharing = shared(first, second)
    expected, sharing_expected = fresh_output(family, apply), fresh_output(other, apply, seed=1)
    patch = apply(pipe)
    inner: list[torch.Tensor] = []
    output = family.run(pipe, callback_on_step_end=each_step(lambda _: inner.append(other.run(sharing, seed=1))))
    assert torch.equal(output, expected)
    assert len(inner) == STEPS
    assert all(torch.equal(one, sharing_expected) for one in inner)
    assert patch.held_bytes() == 0
    assert patch.stats.outside == 0


def test_from_pipe_is_cached_too() -> None:
    family = present("flux")
    expected = fresh_output(family, REUSE)
    pipe = family.make()
    patch = REUSE(pipe)
    again = diffusers.FluxPipeline.from_pipe(pipe, scheduler=flow_euler(dynamic=True))
    again.set_progress_bar_config(disable=True)
    assert torch.equal(family.run(again), expected)
    assert torch.equal(family.run(pipe), expected)
    patch.remove()
    assert torch.equal(family.run(again), family.run(family.make()))


def in_step(jobs: list[Callable[[Callable[..., Any]], torch.Tensor]]) -> list[torch.Tensor]:
    """Runs jobs in threads that wait for each other after each denoising step."""
    barrier = threading.Barrier(len(jobs), timeout=60)
    outputs: list[Any] = [None] * len(jobs)

    def work(index: int) -> None:
        try:
            outputs[index] = jobs[index](each_step(lambda _: barrier.wait() and None))
        except BaseException as error:
            outputs[index] = error
            barrier.abort()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for output in outputs:
        if isinstance(output, BaseException):
            raise output
    return outputs


@cached("taylor", "wan", "flux")
def test_two_pipelines_in_two_threads(family: Family, apply: Apply) -> None:
    expected = [fresh_output(family, apply, seed=seed) for seed in (0, 1)]
    pipes = [family.make(), family.make()]
    patches = [apply(pipe) for pipe in pipes]
    outputs = in_step([lambda wait, i=i: family.run(pipes[i], seed=i, callback_on_step_end=wait) for i in range(2)])
    assert torch.equal(outputs[0], expected[0])
    assert torch.equal(outputs[1], expected[1])
    assert [len(patch.stats.runs) for patch in patches] == [1, 1]


@pytest.mark.parametrize(
    ("first", "second", "apply"), [*((*PAIRS[index], REUSE) for index in (0, 1, 3)), *TEACACHE_PAIRS]
)
def test_shared_transformer_in_two_threads(first: str, second: str, apply: Apply) -> None:
    family, pipe, other, sharing = shared(first, second)
    expected = [fresh_output(family, apply), fresh_output(other, apply, seed=1)]
    patch = apply(pipe)
    outputs = in_step(
        [
            lambda wait: family.run(pipe, callback_on_step_end=wait),
            lambda wait: other.run(sharing, seed=1, callback_on_step_end=wait),
        ]
    )
    assert torch.equal(outputs[0], expected[0])
    assert torch.equal(outputs[1], expected[1])
    assert len(patch.stats.runs) == 2
    assert patch.held_bytes() == 0


def test_nested_run_of_the_same_pipeline_that_fails() -> None:
    """A run inside a run, with an error that the callback swallows, costs the outer run nothing."""
    family, pipe, other, sharing = shared("wan", "wan")
    expected = fresh_output(family, REUSE)
    patch: CachePatch = REUSE(pipe)

    def fail(step: int) -> None:
        if step == 2:
            failing_at(other, sharing, "block", Interrupted)

    assert torch.equal(family.run(pipe, callback_on_step_end=each_step(fail)), expected)
    assert patch.held_bytes() == 0


def test_pipeline_under_a_subclass_and_another_name() -> None:
    """Neither the class's name nor the file it is defined in is looked at."""
    family = present("wan")
    expected = fresh_output(family, REUSE)
    pipe = family.make()

    class Mine(type(pipe)):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(*args, **kwargs)

    mine = Mine(**pipe.components)
    mine.set_progress_bar_config(disable=True)
    REUSE(mine)
    assert torch.equal(family.run(mine), expected)

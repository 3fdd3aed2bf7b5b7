"""`compare` on real pipelines: what it measures, in which order, and what it leaves behind."""

from __future__ import annotations

import math
from contextlib import contextmanager

import pytest
import torch

from invariants import caches
from invariants.families import families, present
from invariants.snapshot import Snapshot, assert_same
from sgl_diffusion_accel import (
    ConfigError,
    ConfigTypeError,
    UnsupportedModelError,
    VariantError,
    apply_cache_dit,
    compare,
    remove,
    set_attention_backend,
)
from sgl_diffusion_accel.patch import patches_on

STEPS = caches.STEPS
NEVER = caches.NEVER_SKIPPING["threshold 0"]
STATIC = caches.static


def static_of_two(pipe):
    return apply_cache_dit(pipe, fn_compute_blocks=0, steps_mask=[1, 0], steps_policy="static")


FAST = {"fewer_steps": False, "warmup": 0}


def some(name="wan", steps=STEPS, count=1, **more):
    family = present(name)
    pipe = family.make()
    return pipe, [family.call(pipe, steps=steps, seed=seed, **more) for seed in range(count)]


@families("wan", "wan22", "qwen", "flux", "ltx")
def test_a_variant_that_never_skips_is_equal_and_one_that_skips_is_not(family):
    pipe = family.make()
    report = compare(pipe, {"never": NEVER, "static": STATIC}, [family.call(pipe, steps=STEPS)], **FAST)
    never, static = report.rows
    assert (never.psnr, never.compute_ratio, never.ssim) == (math.inf, 1.0, 1.0 if never.ssim is not None else None)
    assert 0 < static.psnr < 100
    computed = 4 if family.name == "wan22" else 3  # the first step of each expert is always computed
    assert static.compute_ratio == pytest.approx(STEPS / computed)
    assert static.speedup > 0
    assert set(static.samples[0].maps) == set(family.branches)
    assert all(sum(steps) == computed and len(steps) == STEPS for steps in static.samples[0].maps.values())


def test_the_output_of_a_variant_is_that_of_a_run_by_hand():
    from sgl_diffusion_accel.comparing.measures.metrics import psnr

    family = present("wan")
    pipe, calls = some("wan")
    report = compare(pipe, {"static": STATIC}, calls, **FAST)
    plain = family.run(pipe, steps=STEPS)
    with STATIC(pipe):
        cached = family.run(pipe, steps=STEPS)
    spread = float(plain.max() - plain.min())
    assert report.rows[0].psnr == pytest.approx(psnr(cached[:, None], plain[:, None], spread), abs=1e-6)
    assert report.unpatched.peak_memory_mib is None  # there is no device
    assert "memory" not in report.to_markdown()


def test_everything_is_as_it_was_afterwards():
    pipe, calls = some("wan", count=2)
    pipe(**calls[0])
    before = Snapshot(pipe)
    compare(pipe, {"static": STATIC, "attention": lambda p: set_attention_backend(p, "sdpa")}, calls)
    assert_same(before, pipe)


def test_contenders_run_interleaved_in_an_order_that_rotates_with_the_warm_up_apart():
    pipe, calls = some("wan", count=3)
    applied = []

    def noting(name, apply):
        return lambda p: (applied.append(name), apply(p))[1]

    variants = {"one": noting("one", NEVER), "two": noting("two", STATIC)}
    report = compare(pipe, variants, calls, repeats=2, fewer_steps=False)
    assert len(report.order) == 6
    assert all(sorted(turn) == ["one", "two", "unpatched"] for turn in report.order)
    assert {turn[0] for turn in report.order} == {"one", "two", "unpatched"}
    assert report.order[0] != report.order[1]
    assert applied[:2] == ["one", "two"]  # the warm-up
    assert applied[2:] == [name for turn in report.order for name in turn if name != "unpatched"]
    for row in report.rows:
        assert [sample.call for sample in row.samples] == [0, 1, 2] * 2


def test_speed_ups_are_paired_within_a_round(monkeypatch):
    """Every second call of the clock is the end of a run; the seconds are counted down in the order of the runs."""
    import itertools

    from sgl_diffusion_accel.comparing import runner

    lengths = {"unpatched": [8.0, 6.0], "static": [2.0, 3.0]}
    pipe, calls = some("wan", count=2)
    turns = [["unpatched", "static"], ["static", "unpatched"]]
    taken = iter([lengths[name][turn] for turn, names in enumerate(turns) for name in names])
    clock = itertools.chain.from_iterable((0.0, seconds) for seconds in taken)
    monkeypatch.setattr(runner.time, "perf_counter", lambda: next(clock))
    row = compare(pipe, {"static": STATIC}, calls, **FAST).rows[0]
    assert [sample.speedup for sample in row.samples] == [4.0, 2.0]
    assert (row.speedup, row.seconds) == (3.0, 2.5)
    assert (row.speedup_spread.low, row.speedup_spread.high) == (2.5, 3.5)


def test_fewer_steps_match_what_the_variants_cost():
    pipe, calls = some("wan")
    for warmup in (0, 1):
        report = compare(pipe, {"static": STATIC, "never": NEVER}, calls, warmup=warmup)
        assert [row.name for row in report.rows] == ["static", "never", "3 steps"]
        fewer = report["3 steps"]
        assert fewer.is_fewer_steps
        assert fewer.compute_ratio == 2.0
        assert report["static"].fewer_steps_psnr == pytest.approx(fewer.psnr)
        assert report["never"].fewer_steps_psnr is None


def test_fewer_steps_as_wished_also_without_variants():
    family = present("wan")
    pipe, calls = some("wan")
    report = compare(pipe, {}, calls, fewer_steps=[4, 2], warmup=0)
    assert [(row.name, row.compute_ratio) for row in report.rows] == [("4 steps", 1.5), ("2 steps", 3.0)]
    from sgl_diffusion_accel.comparing.measures.metrics import psnr

    plain, short = family.run(pipe, steps=STEPS), family.run(pipe, steps=2)
    expected = psnr(short[:, None], plain[:, None], float(plain.max() - plain.min()))
    assert report["2 steps"].psnr == pytest.approx(expected, abs=1e-6)


def test_calls_of_several_lengths_have_fewer_steps_by_share():
    family = present("wan")
    pipe = family.make()
    calls = [family.call(pipe, steps=steps) for steps in (6, 12)]
    half = {"half": lambda p: apply_cache_dit(p, fn_compute_blocks=0, steps_mask="late-medium", steps_policy="static")}
    report = compare(pipe, half, calls, warmup=1)
    assert report.rows[1].name.endswith("of the steps")


def test_a_generator_is_the_same_for_everybody_and_stays_where_it_was():
    family = present("flux_img2img")
    pipe = family.make()
    call = family.call(pipe, steps=STEPS)
    generator = call["generator"] = torch.Generator().manual_seed(9)
    state = generator.get_state()
    report = compare(pipe, {"never": NEVER}, [call], warmup=1, fewer_steps=False)
    assert report.rows[0].psnr == math.inf
    assert report.unpatched.repeats_itself_db == math.inf
    assert torch.equal(generator.get_state(), state)


def test_a_seed_decides_the_noise_of_every_run():
    pipe, calls = some("wan")
    del calls[0]["latents"]
    seen = {}

    def keep(output):
        seen.setdefault(len(seen), output.frames.clone())
        return output.frames.sigmoid()

    seeded = [{**calls[0], "seed": 30}, {**calls[0], "seed": 40}, calls[0], calls[0]]
    report = compare(pipe, {"never": NEVER}, seeded, decode=keep, fewer_steps=False, warmup=0)
    assert report.rows[0].psnr == math.inf
    one_of_each = [seen[index] for index in range(0, 8, 2)]
    assert not any(torch.equal(one, other) for i, one in enumerate(one_of_each) for other in one_of_each[:i])


def test_inputs_that_a_pipeline_writes_into_stay_as_they_were():
    pipe, calls = some("wan")
    original = pipe.scheduler.step

    def step_in_place(output, timestep, sample, **kwargs):
        sample.copy_(original(output, timestep, sample, **kwargs)[0])
        return (sample,)

    pipe.scheduler.step = step_in_place
    before = calls[0]["latents"].clone()
    assert compare(pipe, {"never": NEVER}, calls, **FAST).rows[0].psnr == math.inf
    assert torch.equal(calls[0]["latents"], before)


def test_a_pipeline_that_does_not_repeat_itself_is_told():
    pipe, calls = some("wan")
    original, drift = pipe.scheduler.step, iter(range(1, 1000))

    def drifting(output, timestep, sample, **kwargs):
        return (original(output, timestep, sample, **kwargs)[0] + 1e-3 * next(drift),)

    pipe.scheduler.step = drifting
    report = compare(pipe, {"never": NEVER}, calls, fewer_steps=False)
    assert math.isfinite(report.unpatched.repeats_itself_db)
    assert any("does not repeat itself" in remark for remark in report.remarks)


def test_nan_is_reported():
    pipe, calls = some("wan")

    @contextmanager
    def broken(p):
        hook = p.transformer.register_forward_hook(lambda module, args, output: (output[0] * math.nan,))
        yield
        hook.remove()

    report = compare(pipe, {"broken": broken}, calls, **FAST)
    assert math.isnan(report.rows[0].psnr)
    assert any("100.00% of the values of an output of broken" in remark for remark in report.remarks)


def test_nan_of_the_pipeline_itself_is_reported_too():
    pipe, calls = some("wan")
    calls[0]["latents"][:] = math.nan
    report = compare(pipe, {"static": STATIC}, calls)
    assert math.isnan(report.rows[0].psnr)
    assert any("100.00% of the values of an unpatched output" in remark for remark in report.remarks)
    assert report.plot() is not None
    assert "nan" in report.to_markdown()


def test_return_dict_false_is_understood():
    pipe, calls = some("wan")
    report = compare(pipe, {"static": STATIC}, [{**calls[0], "return_dict": False}], **FAST)
    assert report.rows[0].psnr == compare(pipe, {"static": STATIC}, calls, **FAST).rows[0].psnr


def test_the_callers_random_numbers_are_not_touched():
    pipe, calls = some("wan")
    state = torch.get_rng_state()
    compare(pipe, {"static": STATIC}, calls, **FAST)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "variant",
    [
        lambda p: None,
        lambda p: p,
        lambda p: [set_attention_backend(p, "sdpa"), NEVER(p), None],
        lambda p: NEVER(p) and None,
        contextmanager(lambda p: (yield)),
    ],
    ids=["nothing", "pipe", "list", "patch not returned", "context manager"],
)
def test_a_variant_may_return_anything_that_can_be_undone(variant):
    pipe, calls = some("wan")
    report = compare(pipe, {"variant": variant}, calls, **FAST)
    assert (report.rows[0].psnr, report.rows[0].compute_ratio) == (math.inf, 1.0)
    assert patches_on(pipe) == []


def test_a_variant_that_raises_is_named_and_leaves_nothing():
    pipe, calls = some("wan")
    pipe(**calls[0])
    before = Snapshot(pipe)

    def half_way(p):
        set_attention_backend(p, "sdpa")
        raise ValueError("no such thing")

    with pytest.raises(VariantError, match=r"'bad' failed: ValueError: no such thing") as caught:
        compare(pipe, {"good": STATIC, "bad": half_way}, calls)
    assert isinstance(caught.value.__cause__, ValueError)
    assert_same(before, pipe)


def test_a_run_that_fails_or_is_interrupted_leaves_nothing():
    pipe, calls = some("wan")
    pipe(**calls[0])
    before = Snapshot(pipe)
    for error, caught in ((RuntimeError("out of memory"), VariantError), (KeyboardInterrupt(), KeyboardInterrupt)):

        def failing(p, error=error):
            patch = STATIC(p)

            def fail(*_):
                raise error

            hook = p.transformer.register_forward_hook(fail)

            @contextmanager
            def unhooked():
                try:
                    yield
                finally:
                    hook.remove()

            return [patch, unhooked()]

        with pytest.raises(caught):
            compare(pipe, {"failing": failing}, calls)
        pipe._current_timestep = None  # diffusers leaves it there when a run fails
        del failing
    assert_same(before, pipe)


def test_a_variant_that_leaves_something_behind_is_told():
    pipe, calls = some("wan")
    scheduler = pipe.scheduler

    def other_scheduler(p):
        p.scheduler = type(scheduler).from_config(scheduler.config)

    with pytest.raises(VariantError, match="left another scheduler on the pipeline"):
        compare(pipe, {"other": other_scheduler}, calls, **FAST)


def first_block_cache(pipe):
    diffusers = pytest.importorskip("diffusers")
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=1e9))


def test_another_cache_is_measured_by_the_work_that_is_done():
    pipe, calls = some("wan", steps=10)

    @contextmanager
    def theirs(p):
        first_block_cache(p)
        yield
        p.transformer.disable_cache()

    for warmup in (0, 1):
        row = compare(pipe, {"theirs": theirs}, calls, fewer_steps=False, warmup=warmup).rows[0]
        assert row.compute_ratio == pytest.approx(10 / (1 + 9 / 6), rel=0.02)  # the first block of six
        assert row.psnr < 100


def test_another_cache_that_is_left_on_is_told():
    pipe, calls = some("wan")
    with pytest.raises(VariantError, match=r"pipe.transformer.disable_cache\(\)"):
        compare(pipe, {"theirs": first_block_cache}, calls, **FAST)


def test_a_patched_pipeline_is_refused():
    pipe, calls = some("wan")
    STATIC(pipe)
    with pytest.raises(ConfigError, match=r"\(cache\).*Type: remove\(pipe\)"):
        compare(pipe, {"static": STATIC}, calls)
    remove(pipe)
    first_block_cache(pipe)
    with pytest.raises(UnsupportedModelError, match="disable_cache"):
        compare(pipe, {"static": STATIC}, calls)


@pytest.mark.parametrize(
    ("variants", "more", "error", "message"),
    [
        ([STATIC], {}, ConfigTypeError, "a dict of names"),
        ({"unpatched": STATIC}, {}, ConfigError, "any text but 'unpatched'"),
        ({" ": STATIC}, {}, ConfigError, "any text"),
        ({"a": 3}, {}, ConfigTypeError, "a function that takes the pipeline"),
        ({}, {}, ConfigError, "nothing to compare"),
        ({"a": STATIC}, {"repeats": 0}, ConfigError, "from 1"),
        ({"a": STATIC}, {"repeats": 1.5}, ConfigTypeError, "a whole number"),
        ({"a": STATIC}, {"warmup": -1}, ConfigError, "from 0"),
        ({"a": STATIC}, {"decode": 3}, ConfigTypeError, "decode is a int"),
        ({"a": STATIC}, {"fewer_steps": "all"}, ConfigTypeError, r"such as \[25, 15\]"),
        ({"a": STATIC}, {"fewer_steps": [6]}, ConfigError, "1 to 5"),
        ({"a": STATIC}, {"fewer_steps": [0]}, ConfigError, "1 to 5"),
        ({"a": lambda p: 3}, {}, VariantError, "'a' returned a int"),
    ],
)
def test_wrong_arguments_are_told_before_anything_is_left_patched(variants, more, error, message):
    pipe, calls = some("wan")
    with pytest.raises(error, match=message):
        compare(pipe, variants, calls, **more)
    assert patches_on(pipe) == []


def test_a_bare_transformer_is_refused():
    pipe, calls = some("wan")
    with pytest.raises(ConfigTypeError, match="needs a pipeline"):
        compare(pipe.transformer, {"static": STATIC}, calls)


def test_a_name_of_a_fewer_steps_row_is_not_taken_by_a_variant():
    pipe, calls = some("wan")
    with pytest.raises(ConfigError, match="'3 steps'"):
        compare(pipe, {"3 steps": STATIC}, calls)


def test_the_compilers_time_is_not_a_variants():
    pipe, calls = some("wan", steps=2)
    pipe.transformer.blocks[0].compile(backend="eager")
    made = []
    pipe.transformer.register_forward_pre_hook(lambda *_: made.append(None))
    variants = {"static": static_of_two, "attention": lambda p: set_attention_backend(p, "sdpa")}
    report = compare(pipe, variants, calls, **FAST)
    assert len(made) == 2 * 2 * (1 + 1 + 2)  # steps, branches, runs: one unpatched, one cached, two redirected
    assert report["static"].compute_ratio == pytest.approx(2.0)
    assert report["attention"].compute_ratio is None
    assert report["attention"].psnr == math.inf
    assert any("no compute ratio for attention" in remark for remark in report.remarks)


@pytest.mark.gpu
def test_peak_memory_and_seconds_are_the_devices():
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU: torch.cuda is not available")
    pipe, calls = some("wan")
    pipe.to("cuda")
    # Pipelines move the latents that they are given to their own device, but not the embeddings.
    calls = [{k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in call.items()} for call in calls]
    report = compare(pipe, {"static": STATIC, "never": NEVER}, calls)
    assert report.unpatched.peak_memory_mib > 0
    assert report["static"].peak_memory_mib >= report["static"].samples[0].peak_memory_mib > 0
    assert report["never"].psnr == math.inf
    assert "peak memory" in report.to_markdown()

"""`apply_auto`: several patches as one, a cache where it pays and none where fewer steps may be better."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch

from invariants import Snapshot, assert_same
from invariants.caches import plan_for
from invariants.families import present
from miniatures import call_kwargs, captions, load_miniature, to_frames
from sgl_diffusion_accel import (
    AutoConfig,
    AutoPatch,
    ConfigError,
    ConfigTypeError,
    Patch,
    UnsupportedModelError,
    apply_adaptive_cache,
    apply_auto,
    apply_cache_plan,
    apply_lossless,
    apply_teacache,
    denoising_steps,
    remove,
    set_attention_backend,
)
from sgl_diffusion_accel.attention.attention_patch import AttentionPatch
from sgl_diffusion_accel.attention.backends.registry import find_backend
from sgl_diffusion_accel.attention.measured_choice import MeasuredChoice
from sgl_diffusion_accel.auto.auto_config import TOLERANCES
from sgl_diffusion_accel.auto.run_choice import FEWEST_COMPUTED, FEWEST_STEPS
from sgl_diffusion_accel.patch import patches_on
from zoo import FAMILIES

torch.set_num_threads(1)

LONG = 16
"""Steps of a run in which some are skipped."""


@pytest.fixture
def pipe() -> Any:
    return present("wan").make()


def run(pipe: Any, steps: int = LONG, **given: Any) -> torch.Tensor:
    return FAMILIES["wan"].run(pipe, steps=steps, **given)


def noisy() -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)


def remarks(patch: AutoPatch) -> str:
    return "\n".join(remark for _, remark in patch.stats.runs[-1].remarks)


def kinds_on(pipe: Any) -> set[str]:
    return {patch.kind for patch in patches_on(pipe)}


def skipped(patch: AutoPatch) -> int:
    """Steps that the last run did not compute."""
    return sum(not each for each in patch.stats.runs[-1].branches["cond"].computed)


# What it puts on


def test_usual_is_balanced(pipe: Any) -> None:
    patch = apply_auto(pipe)
    assert patch.config == AutoConfig("balanced", None, None)
    assert list(patch.parts) == ["lossless", "cache"]
    run(pipe)
    assert skipped(patch) > 0


@pytest.mark.parametrize(("quality", "tolerance"), [("high", 0.0003), ("balanced", 0.001)])
def test_quality_is_the_tolerance_of_the_adaptive_cache(pipe: Any, quality: str, tolerance: float) -> None:
    with apply_adaptive_cache(pipe, tolerance=tolerance):
        expected = run(pipe)
    with apply_auto(pipe, quality):
        assert torch.equal(run(pipe), expected)


def test_fast_is_more_careful_in_short_runs(pipe: Any) -> None:
    assert TOLERANCES == {"lossless": 0.0, "high": 0.0003, "balanced": 0.001, "fast": 0.003}
    for steps, tolerance in ((LONG, 0.001), (24, 0.0015), (32, 0.003)):
        with apply_adaptive_cache(pipe, tolerance=tolerance):
            expected = run(pipe, steps)
        with apply_auto(pipe, "fast") as patch:
            assert torch.equal(run(pipe, steps), expected)
            assert ("the tolerance is" in remarks(patch)) == (steps < 30)


def test_lossless_computes_everything() -> None:
    family = present("hunyuan")
    pipe = family.make()
    with apply_lossless(pipe):
        expected = family.run(pipe, steps=LONG)
    patch = apply_auto(pipe, "lossless")
    assert list(patch.parts) == ["lossless"]
    assert torch.equal(family.run(pipe, steps=LONG), expected)
    assert patch.stats.runs == ()
    assert "cache: left out: quality 'lossless'" in str(patch)


def test_transformer_by_itself(pipe: Any) -> None:
    patch = apply_auto(pipe.transformer)
    run(pipe)
    assert skipped(patch) > 0
    remove(pipe.transformer)
    assert not patch.active


def test_second_expert_and_denoiser_for_each_branch() -> None:
    for name in ("wan22", "ideogram4"):
        family = present(name)
        pipe = family.make()
        patch = apply_auto(pipe)
        family.run(pipe, steps=LONG)
        assert not patch.stats.unplaced
        assert all(len(list(patches_on(getattr(pipe, each)))) >= 2 for each in family.transformers)


# Where the cache is left out, run by run


@pytest.mark.parametrize("steps", [1, 4, 8, FEWEST_STEPS - 1])
def test_short_runs_are_bitwise_unpatched(pipe: Any, steps: int) -> None:
    expected = run(pipe, steps)
    patch = apply_auto(pipe, "fast")
    assert torch.equal(run(pipe, steps), expected)
    assert "left out of this run" in remarks(patch)
    assert f"of {steps} steps" in str(patch)


@pytest.mark.parametrize("made", [noisy, lambda: diffusers.FlowMatchLCMScheduler(shift=3.0)], ids=["SDE", "LCM"])
def test_scheduler_that_adds_noise_has_no_cache(pipe: Any, made: Any) -> None:
    pipe.scheduler = made()
    torch.manual_seed(0)
    expected = run(pipe)
    patch = apply_auto(pipe)
    torch.manual_seed(0)
    assert torch.equal(run(pipe), expected)
    assert "adds noise of its own" in remarks(patch)
    assert type(pipe.scheduler).__name__ in remarks(patch)


def test_scheduler_may_be_exchanged_between_runs(pipe: Any) -> None:
    patch, usual = apply_auto(pipe), pipe.scheduler
    run(pipe)
    first = skipped(patch)
    pipe.scheduler = noisy()
    run(pipe)
    assert skipped(patch) == 0
    pipe.scheduler = usual
    run(pipe)
    assert skipped(patch) == first > 0
    assert remarks(patch) == ""


def test_loop_of_ones_own_without_a_scheduler_has_no_cache(pipe: Any) -> None:
    patch, call = apply_auto(pipe), FAMILIES["wan"].call(pipe, steps=LONG)
    pipe.scheduler.set_timesteps(LONG)
    with torch.no_grad():
        for t in denoising_steps(pipe.scheduler.timesteps):
            pipe.transformer(
                hidden_states=call["latents"], timestep=t[None], encoder_hidden_states=call["prompt_embeds"]
            )
    assert skipped(patch) == 0
    assert "denoising_steps(scheduler.timesteps, scheduler=scheduler)" in remarks(patch)


# Plans


def test_plan_is_followed(pipe: Any) -> None:
    plan = plan_for("wan", LONG)
    with apply_cache_plan(pipe, plan, speedup=2.0):
        expected = run(pipe)
    with apply_auto(pipe, speedup=2.0, plan=plan) as patch:
        assert torch.equal(run(pipe), expected)
        assert remarks(patch) == ""


def test_plan_computes_eight_steps_at_least(pipe: Any) -> None:
    patch = apply_auto(pipe, speedup=4.0, plan=plan_for("wan", LONG))
    run(pipe)
    assert LONG - skipped(patch) >= FEWEST_COMPUTED
    assert f"{FEWEST_COMPUTED} of {LONG} steps are computed" in remarks(patch)


def test_plan_is_left_out_where_it_cannot_be(pipe: Any) -> None:
    """`apply_cache_plan` raises there; this one decides run by run."""
    pipe.scheduler = noisy()
    patch = apply_auto(pipe, speedup=2.0, plan=plan_for("wan", LONG))
    run(pipe)
    assert skipped(patch) == 0
    run(pipe, 4)
    assert skipped(patch) == 0


def test_plan_of_another_model_is_refused(pipe: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=r"calibrate\(pipe, calls\)"):
        apply_auto(pipe, speedup=2.0, plan=replace(plan_for("wan", LONG), transformers=("Other",)))
    assert kinds_on(pipe) == set()


# Bad arguments


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({"quality": "balancd"}, ConfigError, "Did you mean 'balanced'"),
        ({"quality": 3}, ConfigTypeError, "quality=3 is a int; allowed: 'lossless', 'high', 'balanced', 'fast'"),
        ({"speedup": 2.5}, ConfigError, r"plan = calibrate\(pipe, calls\), then apply_auto\(pipe, speedup=2.5"),
        ({"speedup": 0.5, "plan": "plan"}, ConfigTypeError, "CachePlan.load"),
        ({"plan": "plan"}, ConfigTypeError, "CachePlan.load"),
        ({"qualty": "high"}, ConfigError, "Did you mean 'quality'"),
    ],
    ids=str,
)
def test_bad_arguments(pipe: Any, given: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        apply_auto(pipe, **given)
    assert kinds_on(pipe) == set()


def test_plan_needs_a_speedup_and_a_quality_that_allows_it() -> None:
    plan = plan_for("wan", LONG)
    with pytest.raises(ConfigError, match=r"apply_auto\(pipe, speedup=2.5, plan=plan\)"):
        AutoConfig(plan=plan)
    with pytest.raises(ConfigError, match="computes every step"):
        AutoConfig("lossless", 2.0, plan)
    with pytest.raises(ConfigError, match=r"speedup=0\.5"):
        AutoConfig(speedup=0.5, plan=plan)


def test_config_of_another_patch_goes_alone(pipe: Any) -> None:
    config = apply_auto(pipe, "high").config
    assert apply_auto(pipe, config).config == config
    with pytest.raises(ConfigError, match=r"dataclasses\.replace"):
        apply_auto(pipe, config, speedup=2.0)


def test_what_is_no_pipeline_is_refused() -> None:
    with pytest.raises(ConfigTypeError, match="Hand over"):
        apply_auto("wan")


def test_diffusers_own_cache_is_refused(pipe: Any) -> None:
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(UnsupportedModelError, match="disable_cache"):
        apply_auto(pipe)
    assert kinds_on(pipe) == set()
    assert list(apply_auto(pipe, "lossless").parts) == ["lossless"]


# One patch, one undo


@pytest.mark.parametrize("how", ["patch", "pipe", "with", "error", "twice"])
def test_removed_exactly(pipe: Any, how: str) -> None:
    expected = run(pipe)
    before = Snapshot(pipe)
    patch = apply_auto(pipe)
    run(pipe)
    if how == "pipe":
        remove(pipe)
    elif how == "with":
        with patch:
            run(pipe)
    elif how == "error":
        with pytest.raises(RuntimeError, match="on purpose"), patch:
            raise RuntimeError("on purpose")
    else:
        patch.remove()
    if how == "twice":
        patch.remove()
    assert_same(before, pipe)
    assert torch.equal(run(pipe), expected)
    assert not patch.active
    assert not any(part.active for part in patch.parts.values())
    assert "[removed]" in repr(patch)


def test_two_instances_and_memory(pipe: Any) -> None:
    other = present("wan").make()
    expected = run(other)
    patch = apply_auto(pipe)
    run(pipe)
    gc.collect()
    assert patch.held_bytes() == 0
    assert torch.equal(run(other), expected)
    assert kinds_on(other) == set()


def test_applied_again_takes_its_own_place(pipe: Any) -> None:
    first = apply_auto(pipe)
    second = apply_auto(pipe, "lossless")
    assert not first.active
    assert not first.parts["cache"].active
    assert kinds_on(pipe) == {"auto", "lossless"}
    second.remove()
    assert kinds_on(pipe) == set()


def test_inner_block_hands_back_to_the_outer_one(pipe: Any) -> None:
    with apply_auto(pipe) as outer:
        with apply_auto(pipe, "lossless") as inner:
            assert kinds_on(pipe) == {"auto", "lossless"}
            assert "another one has taken its place" in str(outer)
            run(pipe)
        assert not inner.active
        assert outer.active
        assert all(part.active for part in outer.parts.values())
        run(pipe)
        assert skipped(outer) > 0
    assert kinds_on(pipe) == set()


def test_explicit_patch_takes_the_place_of_its_part(pipe: Any) -> None:
    patch = apply_auto(pipe)
    mine = apply_teacache(pipe, 0.2)
    assert "cache: replaced by <TeaCache" in str(patch).replace("'", "")
    run(pipe)
    assert mine.stats.runs
    assert patch.stats.runs == ()
    patch.remove()
    assert kinds_on(pipe) == {"cache"}
    assert mine.active


def test_part_comes_back_after_an_explicit_block(pipe: Any) -> None:
    with apply_auto(pipe) as patch:
        with apply_teacache(pipe, 0.2):
            assert not patch.parts["cache"].active
        assert patch.parts["cache"].active
    assert kinds_on(pipe) == set()


def test_what_waits_comes_back_also_after_it_was_applied_twice(pipe: Any) -> None:
    with apply_adaptive_cache(pipe) as mine:
        first = apply_auto(pipe)
        second = apply_auto(pipe, "high")
        assert not first.active
        second.remove()
        assert mine.active
        run(pipe)
        assert mine.stats.runs
    assert kinds_on(pipe) == set()


def test_part_that_is_removed_by_itself_is_told(pipe: Any) -> None:
    patch = apply_auto(pipe)
    patch.parts["cache"].remove()
    assert "cache: removed since" in str(patch)
    assert patch.active
    patch.remove()
    assert kinds_on(pipe) == set()


def test_cache_of_ones_own_stays_under_lossless_and_is_told(pipe: Any) -> None:
    mine = apply_teacache(pipe, 0.2)
    patch = apply_auto(pipe, "lossless")
    assert mine.active
    assert "another one is on it" in str(patch)


def test_failure_in_mid_application_leaves_nothing(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = Snapshot(pipe)
    monkeypatch.setattr("sgl_diffusion_accel.auto.apply_auto._add_attention", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        apply_auto(pipe)
    assert_same(before, pipe)


def test_exchanged_transformer_is_told(pipe: Any) -> None:
    patch = apply_auto(pipe)
    pipe.transformer = present("wan").make(seed=1).transformer
    assert not patch.active
    assert "was replaced since" in str(patch)
    remove(pipe)


def test_print_tells_all(pipe: Any) -> None:
    patch = apply_auto(pipe)
    for text in (str(patch), patch._repr_html_()):
        assert "lossless" in text
        assert "adaptive cache (tolerance 0.001)" in text
        assert "attention: left out: there is no CUDA GPU here" in text
    assert isinstance(patch, Patch)


# Attention by measurement


@pytest.fixture
def picks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A GPU, as far as apply_auto looks, on which measurement finds the backend that is named in the list."""
    names = ["sdpa"]

    def find(self: MeasuredChoice, facts: Any, sides: Any, more: Any) -> Any:
        self.picks["a call"] = names[0]
        return find_backend(names[0])

    monkeypatch.setattr("sgl_diffusion_accel.auto.apply_auto.has_gpu", lambda: True)
    monkeypatch.setattr(MeasuredChoice, "_find", find)
    return names


def test_attention_goes_again_where_it_gains_nothing(pipe: Any, picks: list[str]) -> None:
    expected = run(pipe, 6)
    before = Snapshot(pipe)
    patch = apply_auto(pipe)
    assert isinstance(patch.parts["attention"], AttentionPatch)
    assert torch.equal(run(pipe, 6), expected)
    assert "attention" not in patch.parts
    assert kinds_on(pipe) == {"auto", "lossless", "cache"}
    assert "PyTorch's own is the fastest" in str(patch)
    patch.remove()
    assert_same(before, pipe)


def test_attention_stays_where_it_wins(pipe: Any, picks: list[str]) -> None:
    picks[:] = ["math"]
    patch = apply_auto(pipe)
    run(pipe, 6)
    assert patch.parts["attention"].active
    assert "math" in str(patch)
    patch.remove()
    assert kinds_on(pipe) == set()


def test_attention_that_cannot_be_set_is_left_out_with_the_reason(picks: list[str]) -> None:
    family = present("sana")
    pipe = family.make()
    patch = apply_auto(pipe)
    assert list(patch.parts) == ["lossless", "cache"]
    assert "linear attention" in str(patch)


def test_attention_of_ones_own_takes_its_place(pipe: Any, picks: list[str]) -> None:
    patch = apply_auto(pipe)
    mine = set_attention_backend(pipe, "math")
    run(pipe, 6)
    assert "attention: replaced by" in str(patch)
    assert mine.active


# Never worse than fewer steps


@pytest.mark.parametrize("steps", [8, 20])
def test_no_picture_is_worse_than_that_of_as_few_plain_steps(steps: int) -> None:
    pipe: Any = load_miniature("qwen")
    text = captions("qwen", 1, 77)[0]

    def frames(steps: int) -> torch.Tensor:
        with torch.no_grad():
            return torch.from_numpy(to_frames("qwen", pipe(**call_kwargs("qwen", text, steps=steps))))

    full = frames(steps)
    with apply_auto(pipe, "fast") as patch:
        found = frames(steps)
        computed = steps - skipped(patch)
    if computed == steps:
        assert torch.equal(found, full)
    else:
        assert (found - full).square().mean() < (frames(computed) - full).square().mean()

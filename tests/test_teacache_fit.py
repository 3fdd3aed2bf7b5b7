"""Fitting TeaCache to a model: NumPy's fit of what plain hooks see in uncached runs, and nothing left behind."""

from __future__ import annotations

import inspect
import itertools
import logging
from dataclasses import dataclass, field
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import nn

from invariants import Interrupted, Snapshot, assert_same, chosen, cross, families
from invariants.families import few_blocks, present
from sgl_diffusion_accel import (
    ConfigError,
    ConfigTypeError,
    TeaCacheCoefficients,
    UnsupportedModelError,
    apply_cache_dit,
    apply_teacache,
    fit_teacache,
)
from zoo import Family, tensor_of

STEPS = 12


@dataclass
class Seen:
    """What plain hooks see of one transformer in uncached runs: its signal and its output, call by call."""

    signals: list[np.ndarray] = field(default_factory=list)
    outputs: list[np.ndarray] = field(default_factory=list)


def numbers(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().numpy().copy()


def watch(transformer: Any, blocks: str, retains: bool) -> tuple[Seen, list[Any]]:
    """Records a transformer's calls; returns the record, which fills up, and the hooks."""
    seen = Seen()

    def embedded(module: nn.Module, args: Any, output: Any) -> None:
        seen.signals.append(numbers(output[1 if retains else 0] if isinstance(output, tuple) else output))

    def attended(module: nn.Module, args: Any, kwargs: Any) -> None:
        bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs)
        seen.signals.append(numbers(list(bound.arguments.values())[1]))

    def returned(module: nn.Module, args: Any, output: Any) -> None:
        seen.outputs.append(numbers(tensor_of(output[0])))

    embedding = {"WanTransformer3DModel": "condition_embedder", "CogVideoXTransformer3DModel": "time_embedding"}.get(
        type(transformer).__name__
    )
    if embedding is not None:
        hook = transformer.get_submodule(embedding).register_forward_hook(embedded)
    else:
        parts = transformer.get_submodule(blocks)[0].children()
        attention = next(part for part in parts if type(part).__name__.endswith("Attention"))
        hook = attention.register_forward_pre_hook(attended, with_kwargs=True)
    return seen, [hook, transformer.register_forward_hook(returned)]


def changes(rows: list[np.ndarray], branches: int) -> np.ndarray:
    """Relative L1 change from step to step, branch by branch."""
    pairs = [pair for branch in range(branches) for pair in itertools.pairwise(rows[branch::branches])]
    return np.array([np.abs(now - before).mean() / np.abs(before).mean() for before, now in pairs])


def observed(family: Family, pipe: Any, calls: list[dict[str, Any]], retains: bool = False) -> list[np.ndarray]:
    """For each transformer, the changes of signal and output in uncached runs, `[2, number of changes]`."""
    found: list[list[np.ndarray]] = [[] for _ in family.transformers]
    for call in calls:
        watched = [watch(getattr(pipe, name), family.block_lists[0], retains) for name in family.transformers]
        pipe(**call)
        for points, (seen, hooks) in zip(found, watched, strict=True):
            for hook in hooks:
                hook.remove()
            both = [changes(rows, len(family.branches)) for rows in (seen.signals, seen.outputs)]
            points.append(np.stack(both))
    return [np.concatenate(points, axis=1) for points in found]


def check_fit(fit: TeaCacheCoefficients, points: np.ndarray) -> None:
    """The values are compared, since different coefficients may give the same curve on a short range."""
    signal, output = points
    expected = np.polyval(np.polyfit(signal, output, 4), signal)
    spread = output.max() - output.min()
    np.testing.assert_allclose(np.polyval(fit.coefficients, signal), expected, rtol=0, atol=1e-3 * spread)
    assert fit.low == pytest.approx(signal.min(), rel=1e-4)
    assert fit.high == pytest.approx(signal.max(), rel=1e-4)
    explained = 1 - ((output - expected) ** 2).sum() / ((output - output.mean()) ** 2).sum()
    assert fit.r_squared == pytest.approx(explained, abs=1e-3)


def two_calls(family: Family, pipe: Any, steps: int = STEPS) -> list[dict[str, Any]]:
    return [family.call(pipe, steps=steps, seed=seed) for seed in (0, 1)]


MODELS = ["wan", "wan_v2v", "cogvideox", "flux", "qwen", "hunyuan", "ltx", "lumina2", "zimage"]


@pytest.mark.parametrize("name", chosen(MODELS, "wan", "cogvideox", "flux", "lumina2"))
def test_fit_is_numpy_s_on_what_hooks_see_in_uncached_runs(name: str) -> None:
    family = present(name)
    pipe = few_blocks(family)
    [points] = observed(family, pipe, two_calls(family, pipe))
    fit = fit_teacache(pipe, two_calls(family, pipe))
    assert points.shape[1] == 2 * len(family.branches) * (STEPS - 1)
    check_fit(fit, points)
    assert fit.secondary is None
    assert fit.use_ret_steps is (False if name.startswith("wan") else None)


def test_fit_for_retention_steps_is_on_the_projected_time_embedding() -> None:
    family = present("wan")
    pipe = few_blocks(family)
    [points] = observed(family, pipe, two_calls(family, pipe), retains=True)
    fit = fit_teacache(pipe, two_calls(family, pipe), use_ret_steps=True)
    check_fit(fit, points)
    assert fit.use_ret_steps is True
    assert fit.high != fit_teacache(pipe, two_calls(family, pipe)).high


def test_each_of_two_experts_has_a_fit_of_its_own() -> None:
    family = present("wan22")
    pipe = few_blocks(family)
    calls = two_calls(family, pipe, 24)
    first, second = observed(family, pipe, calls)
    fit = fit_teacache(pipe, two_calls(family, pipe, 24))
    assert fit.secondary is not None
    assert fit.secondary.secondary is None
    assert first.shape[1] + second.shape[1] == 2 * 2 * (24 - 2)
    check_fit(fit, first)
    check_fit(fit.secondary, second)
    assert fit.coefficients != fit.secondary.coefficients


def test_calls_may_come_one_by_one() -> None:
    family = present("wan")
    pipe = few_blocks(family)
    assert fit_teacache(pipe, iter(two_calls(family, pipe))) == fit_teacache(pipe, two_calls(family, pipe))


def other_call(call: dict[str, Any]) -> dict[str, Any]:
    return {**call, "latents": call["latents"].flip(-1), "guidance_scale": 7.0}


class Twice(diffusers.WanPipeline):
    """Runs through its loop twice in one call."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        super().__call__(*args, **other_call(kwargs))
        return super().__call__(*args, **kwargs)


def remade(pipe: Any, cls: type) -> Any:
    other = cls(**pipe.components)
    other.set_progress_bar_config(disable=True)
    return other


def test_call_with_two_loops_pairs_signal_and_output_of_the_same_loop() -> None:
    family = present("wan")
    pipe = few_blocks(family)
    call = family.call(pipe, steps=STEPS)
    [points] = observed(family, pipe, [other_call(call), call])
    twice = remade(pipe, Twice)
    check_fit(fit_teacache(twice, [family.call(pipe, steps=STEPS)]), points)


# Thresholds


def computed_steps(family: Family, pipe: Any, wanted: float, fit: TeaCacheCoefficients, steps: int) -> list[int]:
    """Computed steps on each branch, of a cached run at that speed-up."""
    with apply_teacache(pipe, f"{wanted}x", coefficients=fit) as patch:
        family.run(pipe, steps=steps)
        return [sum(branch.computed) for branch in patch.stats.runs[-1].branches.values()]


@families("cogvideox", "flux", matrix=["wan", "hunyuan"])
def test_thresholds_give_about_the_promised_speedup_on_the_same_call(family: Family) -> None:
    pipe = few_blocks(family)
    fit = fit_teacache(pipe, [family.call(pipe, steps=20)])
    assert set(fit.thresholds) >= {1.25, 1.5, 2.0, 2.5}
    assert list(fit.thresholds.values()) == sorted(fit.thresholds.values())
    for wanted in fit.thresholds:
        for computed in computed_steps(family, pipe, wanted, fit, 20):
            assert abs(computed - 20 / wanted) <= 1.5, f"{computed} of 20 steps at {wanted}x"


@families("wan", "cogvideox")
def test_threshold_keeps_its_promise_where_the_signal_does_not_depend_on_what_is_skipped(family: Family) -> None:
    pipe = few_blocks(family)
    fit = fit_teacache(pipe, [family.call(pipe, steps=20)])
    for wanted in fit.thresholds:
        for computed in computed_steps(family, pipe, wanted, fit, 20):
            assert 20 / computed == pytest.approx(wanted, rel=0.08)


def test_fit_can_be_applied_to_two_experts_by_speedup() -> None:
    family = present("wan22")
    pipe = few_blocks(family)
    fit = fit_teacache(pipe, [family.call(pipe, steps=24)])
    wanted = max(set(fit.thresholds) & set(fit.secondary.thresholds))
    for computed in computed_steps(family, pipe, wanted, fit, 24):
        assert abs(computed - 24 / wanted) <= 2.5, f"{computed} of 24 steps at {wanted}x"


def test_speedups_that_the_window_forbids_have_no_threshold() -> None:
    """With retention steps six of twelve are computed whatever the threshold, else two."""
    family = present("wan")
    pipe = few_blocks(family)
    assert max(fit_teacache(pipe, two_calls(family, pipe), use_ret_steps=True).thresholds) == 2.0
    assert max(fit_teacache(pipe, two_calls(family, pipe)).thresholds) == 4.0


def test_poor_fit_is_said(caplog: pytest.LogCaptureFixture) -> None:
    poor, good = present("chroma"), present("mochi")
    with caplog.at_level(logging.WARNING):
        fit = fit_teacache(poor.make(), [poor.call(None, steps=20)])
    assert fit.r_squared < 0.5
    assert f"R² = {fit.r_squared:.2f}" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        fit = fit_teacache(good.make(), [good.call(None, steps=20)])
    assert fit.r_squared > 0.5
    assert "R²" not in caplog.text


# How it is used


@pytest.mark.parametrize("retains", [False, True])
def test_signal_of_the_fit_is_the_one_that_is_applied(retains: bool) -> None:
    family = present("wan")
    pipe = few_blocks(family)
    fit = fit_teacache(pipe, two_calls(family, pipe), use_ret_steps=retains)
    signal = "projected time embedding" if retains else "time embedding"
    for stated in (None, retains):
        with apply_teacache(pipe, 0.1, coefficients=fit, use_ret_steps=stated) as patch:
            assert f", {signal}" in patch.title
    with pytest.raises(ConfigError, match=rf"use_ret_steps={not retains}, and the coefficients were fitted with"):
        apply_teacache(pipe, 0.1, coefficients=fit, use_ret_steps=not retains)


@families("wan22", "flux", matrix=["wan"])
def test_recording_changes_no_bit_of_the_runs(family: Family) -> None:
    def outputs(run: Any) -> list[torch.Tensor]:
        pipe = few_blocks(family)
        seen: list[torch.Tensor] = []
        for name in family.transformers:
            getattr(pipe, name).register_forward_hook(lambda *call: seen.append(tensor_of(call[2][0]).clone()))
        run(pipe)
        return seen

    expected = outputs(lambda pipe: [pipe(**call) for call in two_calls(family, pipe)])
    recorded = outputs(lambda pipe: fit_teacache(pipe, two_calls(family, pipe)))
    assert len(recorded) == len(expected) == 2 * STEPS * len(family.branches)
    assert all(map(torch.equal, recorded, expected))


@families("wan22", "flux", matrix=["wan", "cogvideox"])
def test_pipeline_is_left_as_it_was(family: Family) -> None:
    pipe = few_blocks(family)
    family.run(pipe, steps=STEPS)
    before = Snapshot(pipe)
    fit_teacache(pipe, two_calls(family, pipe))
    assert_same(before, pipe)


@cross("at, error", {"second call": STEPS + 3, "later step": 7, "first step": 0}, [Interrupted, KeyboardInterrupt])
def test_error_in_a_call_comes_out_and_leaves_the_pipeline_as_it_was(at: int, error: type[BaseException]) -> None:
    family = present("wan")
    pipe = few_blocks(family)
    expected = family.run(pipe, steps=STEPS)
    before, steps = Snapshot(pipe), itertools.count()

    def fail(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if next(steps) == at:
            raise error("on purpose")
        return values

    with pytest.raises(error, match="on purpose"):
        fit_teacache(pipe, [{**call, "callback_on_step_end": fail} for call in two_calls(family, pipe)])
    assert torch.equal(family.run(pipe, steps=STEPS), expected)
    assert_same(before, pipe)


# Refusals


def unchanged_refusal(pipe: Any, error: type[Exception], match: str, *args: Any, **kwargs: Any) -> None:
    before = Snapshot(pipe)
    with pytest.raises(error, match=match):
        fit_teacache(pipe, *args, **kwargs)
    assert_same(before, pipe)


@pytest.mark.parametrize(
    ("calls", "error", "match"),
    [
        ([], ConfigError, r"^calls is empty.*at least one pipe\(\.\.\.\) call"),
        ({"num_inference_steps": 20}, ConfigTypeError, "^calls is a dict; allowed: a list of dicts"),
        ("a cat", ConfigTypeError, "^calls is a str; allowed: a list of dicts"),
        (None, ConfigTypeError, "^calls is a NoneType"),
        (["a cat"], ConfigTypeError, "^calls holds a str; allowed: dicts"),
        ([{}, None], ConfigTypeError, "^calls holds a NoneType"),
    ],
)
def test_calls_that_are_no_list_of_dicts_are_refused_before_any_runs(
    calls: Any, error: type[Exception], match: str
) -> None:
    pipe = present("wan").make()
    pipe.transformer.register_forward_pre_hook(lambda *_: pytest.fail("a call was run"))
    unchanged_refusal(pipe, error, match, calls)


@pytest.mark.parametrize(
    ("steps", "match"),
    [
        (1, "0 different changes.*ran 1 steps at most.*10 denoising steps or more"),
        (5, "4 different changes of the signal of transformer.*10 denoising steps or more"),
    ],
)
def test_too_few_steps_are_refused_with_how_many_to_give(steps: int, match: str) -> None:
    family = present("wan")
    pipe = few_blocks(family)
    family.run(pipe, steps=steps)
    unchanged_refusal(pipe, ConfigError, match, [family.call(pipe, steps=steps)])


@pytest.mark.parametrize("apply", [apply_cache_dit, lambda pipe: apply_teacache(pipe, "2x")])
@pytest.mark.parametrize("component", ["transformer", "transformer_2"])
def test_pipeline_with_a_cache_is_refused_and_keeps_it(apply: Any, component: str) -> None:
    family = present("wan22")
    pipe = few_blocks(family)
    patch = apply(getattr(pipe, component))
    unchanged_refusal(pipe, ConfigError, r"cache is on this pipeline.*Type: remove\(pipe\)", [family.call(pipe)])
    assert patch.active


def test_cache_of_diffusers_is_refused() -> None:
    family = present("wan")
    pipe = few_blocks(family)
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
    unchanged_refusal(pipe, UnsupportedModelError, "disable_cache", [family.call(pipe)])


def test_transformer_alone_is_refused_with_what_to_type() -> None:
    family = present("wan")
    for alone in (family.make().transformer, nn.Linear(2, 2), object(), None):
        with pytest.raises(ConfigTypeError, match=r"needs a pipeline.*Type: fit_teacache\(pipe, calls="):
            fit_teacache(alone, [family.call(None)])


def test_choice_between_signals_is_refused_where_there_is_one() -> None:
    family = present("flux")
    unchanged_refusal(
        family.make(), ConfigError, "FluxTransformer2DModel has one signal", [family.call(None)], use_ret_steps=True
    )


class Idle(diffusers.WanPipeline):
    """Never comes to its loop."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        return None


def test_pipeline_without_a_known_loop_is_refused() -> None:
    pipe = remade(present("wan").make(), Idle)
    unchanged_refusal(pipe, UnsupportedModelError, "Idle ran without a denoising loop", [{}])


def test_expert_that_hardly_runs_is_refused_by_name() -> None:
    family = present("wan22")
    pipe = family.make(boundary_ratio=0.99)
    with pytest.raises(ConfigError, match=r"signal of transformer, which ran [12] steps at most"):
        fit_teacache(pipe, [family.call(pipe, steps=12)])


def test_cache_that_is_applied_within_a_call_is_noticed() -> None:
    family = present("wan")
    pipe = few_blocks(family)

    def apply(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == 6:
            apply_teacache(pipe, 0.1)
        return values

    with pytest.raises(ConfigError, match="took the recording off"):
        fit_teacache(pipe, [family.call(pipe, steps=STEPS, callback_on_step_end=apply)])


def test_fit_knows_how_many_steps_its_calls_had() -> None:
    family = present("wan")
    pipe = few_blocks(family)
    assert fit_teacache(pipe, [family.call(pipe, steps=12)]).steps == 12
    assert fit_teacache(pipe, [family.call(pipe, steps=steps) for steps in (10, 12)]).steps is None

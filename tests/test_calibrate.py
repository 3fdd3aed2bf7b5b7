"""Calibration on pipelines: what is learned, what is left alone, and what is refused."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from invariants import Interrupted, Snapshot, assert_same, families
from invariants.families import few_blocks, present
from sgl_diffusion_accel import (
    CachePlan,
    ConfigError,
    ConfigTypeError,
    UnsupportedModelError,
    apply_adaptive_cache,
    apply_cache_dit,
    calibrate,
    check_plan,
    fit_teacache,
)
from sgl_diffusion_accel.calibration.call_record import recording
from zoo import Family
from zoo.base import assemble, build, flow_euler, normal, unipc_flow

STEPS = 8


def calls(family: Family, count: int = 1, pipe: Any = None, steps: int = STEPS, **kw: Any) -> list[dict[str, Any]]:
    return [family.call(pipe, steps=steps, seed=seed, **kw) for seed in range(count)]


def given_to_the_scheduler(pipe: Any, call: dict[str, Any]) -> torch.Tensor:
    """What the pipeline's own scheduler gets at each step of an unpatched run, `[S, elements]`."""
    seen: list[torch.Tensor] = []
    kind = type(scheduler := pipe.scheduler)

    class Watched(kind):  # type: ignore[misc, valid-type]
        def step(self, output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if self is scheduler:  # and no copy of it
                seen.append(output.detach().flatten().double().clone())
            return super().step(output, *args, **kwargs)

    scheduler.__class__ = Watched
    with torch.no_grad():
        pipe(**call)
    scheduler.__class__ = kind
    return torch.stack(seen)


@families("wan", "flux", "sana", "zimage", matrix=["qwen", "cogvideox", "hunyuan15"])
def test_products_are_those_of_what_the_scheduler_is_given(family: Family) -> None:
    pipe = few_blocks(family)
    given = calls(family, 2, pipe)
    plan = calibrate(pipe, given, teacache=False)
    seen = [given_to_the_scheduler(pipe, call) for call in given]
    wanted = sum(each @ each.T / each.shape[1] for each in seen) / 2
    np.testing.assert_allclose(plan.gram_matrix, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
    assert plan.calls == 2
    assert plan.steps == STEPS
    assert list(plan.timesteps) == pipe.scheduler.timesteps.float().tolist()
    assert plan.pipeline == type(pipe).__name__
    assert plan.scheduler == type(pipe.scheduler).__name__
    assert plan.transformers == (type(pipe.transformer).__name__,)


def test_experts_are_planned_together() -> None:
    family = present("wan22")
    plan = calibrate(few_blocks(family), calls(family, steps=16))
    assert plan.transformers == ("WanTransformer3DModel",) * 2
    assert plan.steps == 16
    assert plan.teacache_coefficients.secondary is not None


def test_three_branches() -> None:
    family = present("hunyuan15")
    if not hasattr(diffusers, "SkipLayerGuidance"):
        pytest.skip("this diffusers has no SkipLayerGuidance")

    class Third(diffusers.SkipLayerGuidance):  # type: ignore[misc]
        def prepare_models(self, denoiser: Any) -> None:
            self._count_prepared += 1

        def cleanup_models(self, denoiser: Any) -> None:
            pass

    pipe = few_blocks(family)
    pipe.guider = Third(
        guidance_scale=4.0,
        skip_layer_guidance_start=0.0,
        skip_layer_guidance_stop=1.0,
        skip_layer_config=diffusers.LayerSkipConfig(indices=[2], fqn="transformer_blocks"),
    )
    plan = calibrate(pipe, calls(family), teacache=False)
    assert plan.steps == STEPS


@families("wan22", "ltx", matrix=["wan", "flux"])
def test_nothing_is_changed(family: Family) -> None:
    pipe = few_blocks(family)
    expected = family.run(pipe, steps=STEPS)
    before, scheduler = Snapshot(pipe), set(vars(pipe.scheduler))
    seen = {}
    for teacache in (True, False):

        def keep(module: Any, args: Any, output: Any, teacache: bool = teacache) -> None:
            seen.setdefault(teacache, []).append(output[0])

        hook = pipe.transformer.register_forward_hook(keep)
        calibrate(pipe, [family.call(pipe, steps=STEPS)], teacache=teacache, magnitudes=teacache)
        hook.remove()
        assert_same(before, pipe)
        assert set(vars(pipe.scheduler)) == scheduler
    assert all(torch.equal(one, other) for one, other in zip(seen[True], seen[False], strict=True))
    assert torch.equal(family.run(pipe, steps=STEPS), expected)


@families("wan", "flux")
def test_recorded_runs_are_bitwise_those_of_the_unpatched_pipeline(family: Family) -> None:
    pipe = few_blocks(family)
    call = family.call(pipe, steps=STEPS)
    expected = given_to_the_scheduler(pipe, call)
    seen: list[torch.Tensor] = []
    step = pipe.scheduler.step

    def watched(output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(output.detach().flatten().double().clone())
        return step(output, *args, **kwargs)

    pipe.scheduler.step = watched
    calibrate(pipe, [call])
    assert vars(pipe.scheduler)["step"] is watched
    assert torch.equal(torch.stack(seen), expected)


@pytest.mark.parametrize("error", [Interrupted, KeyboardInterrupt])
def test_pipeline_is_put_back_after_an_error(error: type[BaseException]) -> None:
    family = present("wan")
    pipe = few_blocks(family)

    def fail(*_: Any) -> Any:
        raise error

    with pytest.raises(error):  # what an error leaves on the pipeline without us
        family.run(pipe, steps=STEPS, callback_on_step_end=fail)
    before, scheduler = Snapshot(pipe), set(vars(pipe.scheduler))
    with pytest.raises(error):
        calibrate(pipe, calls(family, callback_on_step_end=fail))
    assert_same(before, pipe)
    assert set(vars(pipe.scheduler)) == scheduler


@families("wan22", matrix=["wan", "flux"])
def test_coefficients_are_those_of_fit_teacache(family: Family) -> None:
    pipe = few_blocks(family)
    given = calls(family, 2, pipe, steps=12)
    plan = calibrate(pipe, given)
    assert plan.teacache_coefficients == fit_teacache(pipe, given)
    assert calibrate(pipe, given, teacache=False).teacache is None


def test_too_few_steps_for_coefficients_leave_a_plan_without() -> None:
    family = present("wan")
    plan = calibrate(few_blocks(family), calls(family, steps=2))
    with pytest.raises(ConfigError, match="no TeaCache coefficients"):
        _ = plan.teacache_coefficients
    assert plan.steps == 2


def counted(pipe: Any) -> list[int]:
    """A list that gets an entry at each call of the transformer."""
    ran: list[int] = []
    pipe.transformer.register_forward_pre_hook(lambda *_: ran.append(1))
    return ran


def test_calls_that_are_in_the_file_are_not_run_again(tmp_path: Path) -> None:
    family = present("flux")
    path = tmp_path / "plan.json"
    given = calls(family, 3)
    whole = calibrate(few_blocks(family), given, teacache=False)
    pipe = few_blocks(family)
    ran = counted(pipe)
    first = calibrate(pipe, given[:2], path, teacache=False)
    assert CachePlan.load(path) == first
    calibrate(pipe, given[:2], path, teacache=False)
    assert len(ran) == 2 * STEPS
    resumed = calibrate(pipe, given, path, teacache=False)
    assert len(ran) == 3 * STEPS
    assert resumed.calls == 3
    np.testing.assert_allclose(resumed.gram, whole.gram, rtol=1e-12)


def test_interrupted_calibration_goes_on_where_it_was(tmp_path: Path) -> None:
    family = present("flux")
    path = tmp_path / "plan.json"
    given = calls(family, 2)

    def fail(*_: Any) -> Any:
        raise KeyboardInterrupt

    pipe = few_blocks(family)
    with pytest.raises(KeyboardInterrupt):
        calibrate(pipe, [given[0], {**given[1], "callback_on_step_end": fail}], path)
    assert CachePlan.load(path).calls == 1
    ran = counted(pipe)
    assert calibrate(pipe, given, path).calls == 2
    assert len(ran) == STEPS


def test_resumed_calibration_has_the_coefficients_of_its_larger_part(tmp_path: Path) -> None:
    family, path = present("flux"), tmp_path / "plan.json"
    given = calls(family, 3, steps=12)
    first = calibrate(few_blocks(family), given[:1], path)
    rest = calibrate(few_blocks(family), given[1:])
    assert first.teacache is not None
    assert calibrate(few_blocks(family), given, path).teacache == rest.teacache != first.teacache
    assert CachePlan.load(path).teacache == rest.teacache


def test_resumed_calibration_has_the_ratios_of_all_calls(tmp_path: Path) -> None:
    family, path = present("wan"), tmp_path / "plan.json"
    given = calls(family, 3)
    whole = calibrate(few_blocks(family), given, teacache=False).magnitude_ratios
    calibrate(few_blocks(family), given[:1], path, teacache=False)
    resumed = calibrate(few_blocks(family), given, path, teacache=False).magnitude_ratios
    assert resumed.calls == whole.calls == 3
    assert resumed.spread["transformer"]["cond"] == pytest.approx(whole.spread["transformer"]["cond"])
    assert resumed.of("transformer", "uncond")[1:-1] == pytest.approx(whole.of("transformer", "uncond")[1:-1])
    assert CachePlan.load(path).magnitudes == resumed


def test_interrupted_calibration_keeps_the_coefficients_of_what_it_has_seen(tmp_path: Path) -> None:
    family, path = present("flux"), tmp_path / "plan.json"
    with pytest.raises(TypeError):
        calibrate(few_blocks(family), [*calls(family, 1, steps=12), {"no_such_argument": 1}], path)
    assert CachePlan.load(path).teacache is not None


OTHERS: dict[str, Any] = {
    "model": lambda: ("flux", {}),
    "steps": lambda: ("wan", {"steps": 5}),
    "guidance": lambda: ("wan", {"guidance": 7.0}),
}


@pytest.mark.parametrize("other", OTHERS)
def test_file_of_another_setting_is_refused(other: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    calibrate(present("wan").make(), calls(present("wan")), path)
    name, kw = OTHERS[other]()
    family = present(name)
    pipe = few_blocks(family)
    with pytest.raises(ConfigError):
        calibrate(pipe, calls(family, **{"steps": STEPS, **kw}), path)


def test_file_of_another_setting_is_refused_before_anything_runs(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    calibrate(present("wan").make(), calls(present("wan")), path)
    family = present("flux")
    pipe = few_blocks(family)
    ran = counted(pipe)
    with pytest.raises(ConfigError):
        calibrate(pipe, calls(family, 2), path)
    assert not ran


def test_damaged_file_is_refused_before_anything_runs(tmp_path: Path) -> None:
    family = present("flux")
    (tmp_path / "plan.json").write_text("{")
    pipe = few_blocks(family)
    ran = counted(pipe)
    with pytest.raises(ConfigError, match="not JSON"):
        calibrate(pipe, calls(family), tmp_path / "plan.json")
    assert not ran


@pytest.mark.parametrize(
    ("other", "named"), [({"steps": 5}, "timesteps"), ({"guidance": 2.0}, "guidance"), ({"batch": 2}, "latents")]
)
def test_calls_that_differ_are_refused(other: dict[str, Any], named: str) -> None:
    family = present("wan")
    pipe = few_blocks(family)
    with pytest.raises(ConfigError, match=named):
        calibrate(pipe, [family.call(pipe, steps=STEPS), family.call(pipe, **{"steps": STEPS, **other})])
    assert "step" not in vars(pipe.scheduler)


@pytest.mark.parametrize(
    ("given", "error"),
    [(None, ConfigTypeError), ([], ConfigError), ({}, ConfigTypeError), ([1], ConfigTypeError), ("x", ConfigTypeError)],
)
def test_calls_of_a_wrong_kind_are_refused(given: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="calls"):
        calibrate(present("wan").make(), given)


def test_something_that_is_no_pipeline_is_refused() -> None:
    family = present("wan")
    for other in (None, object(), few_blocks(family).transformer):
        with pytest.raises(ConfigTypeError, match="pipeline"):
            calibrate(other, calls(family))


@pytest.mark.parametrize("apply", [apply_adaptive_cache, apply_cache_dit])
def test_cache_on_the_pipeline_is_refused(apply: Any) -> None:
    family = present("wan")
    pipe = few_blocks(family)
    patch = apply(pipe)
    with pytest.raises(ConfigError, match=r"remove\(pipe\)"):
        calibrate(pipe, calls(family))
    assert patch.active


def test_stochastic_scheduler_is_refused() -> None:
    family = present("wan")
    pipe = family.make(scheduler=diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True))
    with pytest.raises(UnsupportedModelError, match="noise of its own"):
        calibrate(pipe, calls(family))
    assert "step" not in vars(pipe.scheduler)


def test_stochastic_scheduler_is_refused_before_anything_runs() -> None:
    family = present("wan")
    pipe = family.make(scheduler=diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True))
    ran = counted(pipe)
    with pytest.raises(UnsupportedModelError):
        calibrate(pipe, calls(family))
    assert len(ran) <= 2


@pytest.mark.parametrize(("name", "strength"), [("wan_v2v", 0.5), ("flux_img2img", 0.6)])
def test_picture_to_picture(name: str, strength: float) -> None:
    family = present(name)
    plan = calibrate(few_blocks(family), calls(family, steps=12, strength=strength))
    assert 5 <= plan.steps <= 8


def test_schedulers_of_second_order() -> None:
    family = present("sd3")
    pipe = family.make(scheduler=diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0))
    assert calibrate(pipe, calls(family)).steps == 2 * STEPS - 1


class TwoAtOnce(diffusers.DiffusionPipeline):  # type: ignore[misc]
    """Moves a picture and a sound, as LTX-2 does: the sound by a copy of the scheduler."""

    def __init__(self, transformer: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, latents: torch.Tensor, text: torch.Tensor, steps: int, copied: bool) -> tuple[Any, ...]:
        sound_scheduler = copy.deepcopy(self.scheduler)
        self.scheduler.set_timesteps(steps)
        sound_scheduler.set_timesteps(steps)
        timesteps = self.scheduler.timesteps
        own = copy.deepcopy(self.scheduler) if copied else self.scheduler
        sound = latents[:, :1]
        for i, t in enumerate(timesteps):
            output = self.transformer(latents, t.expand(1), text, return_dict=False)[0]
            latents = own.step(output, t, latents, return_dict=False)[0]
            sound = sound_scheduler.step(3 * output[:, :1] + i, t, sound, return_dict=False)[0]
        return latents, sound


def two_at_once(copied: bool) -> tuple[Any, dict[str, Any]]:
    family = present("wan")
    made = few_blocks(family)
    call = family.call(made, steps=STEPS)
    call = {"latents": call["latents"], "text": call["prompt_embeds"], "steps": STEPS, "copied": copied}
    return TwoAtOnce(made.transformer, made.scheduler), call


def test_second_modality_with_a_copy_of_the_scheduler() -> None:
    pipe, call = two_at_once(copied=False)
    expected = pipe(**call)
    given = given_to_the_scheduler(pipe, call)
    plan = check_plan(pipe, calibrate(pipe, [call]), [call], [2.0])
    np.testing.assert_allclose(plan.gram_matrix, given @ given.T / given.shape[1], rtol=1e-4)
    assert plan.latents == tuple(call["latents"].shape)
    assert all(torch.equal(one, other) for one, other in zip(pipe(**call), expected, strict=True))


def test_pipeline_that_steps_copies_alone_is_refused() -> None:
    pipe, call = two_at_once(copied=True)
    with pytest.raises(UnsupportedModelError, match="may step copies of it"):
        calibrate(pipe, [call])


def test_frames_with_a_scheduler_each_are_refused() -> None:
    try:
        _ = diffusers.SkyReelsV2DiffusionForcingPipeline
    except (AttributeError, RuntimeError) as error:  # older ones need ftfy to import it
        pytest.skip(f"this diffusers has no SkyReels-V2: {error}")
    config = {"patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2}
    sizes = {"in_channels": 4, "out_channels": 4, "text_dim": 16, "freq_dim": 16, "ffn_dim": 32, "rope_max_seq_len": 32}
    model = build("SkyReelsV2Transformer3DModel", 0, **config, **sizes, inject_sample_info=False)
    parts = {"tokenizer": None, "text_encoder": None, "vae": None, "transformer": model, "scheduler": unipc_flow()}
    pipe = assemble("SkyReelsV2DiffusionForcingPipeline", **parts)
    call = {
        "prompt": None,
        "prompt_embeds": normal(1, 7, 16, seed=0, key="prompt"),
        "height": 32,
        "width": 32,
        "num_frames": 9,
        "base_num_frames": 9,
        "num_inference_steps": STEPS,
        "guidance_scale": 1.0,
        "output_type": "latent",
    }
    expected = pipe(**call, generator=torch.Generator().manual_seed(0)).frames
    with recording(pipe) as watch:
        runs = watch.runs
        assert torch.equal(pipe(**call, generator=torch.Generator().manual_seed(0)).frames, expected)
    assert not runs
    with pytest.raises(UnsupportedModelError, match="one for each frame"):
        calibrate(pipe, [call], teacache=False, magnitudes=False)
    with pytest.raises(UnsupportedModelError, match="Nothing was recorded"):
        calibrate(pipe, [call])


def test_run_that_is_not_finite_is_refused() -> None:
    family = present("wan")
    pipe = few_blocks(family)
    call = family.call(pipe, steps=STEPS)
    call["latents"][0, 0, 0, 0, 0] = float("nan")
    with pytest.raises(ConfigError, match="not finite"):
        calibrate(pipe, [call])


def test_model_that_says_nothing_is_refused() -> None:
    family = present("flux")
    pipe = few_blocks(family)
    for parameter in pipe.transformer.proj_out.parameters():
        parameter.data.zero_()
    with pytest.raises(ConfigError):
        calibrate(pipe, calls(family), teacache=False)


def test_progress_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    family = present("flux")
    with caplog.at_level(logging.INFO, logger="sgl_diffusion_accel"):
        calibrate(few_blocks(family), calls(family, 2), teacache=False)
        assert [each for each in caplog.messages if "call 2 of 2" in each]
        caplog.clear()
        calibrate(few_blocks(family), calls(family, 2), teacache=False, progress=False)
        assert not [each for each in caplog.messages if "call" in each]


def test_calls_may_be_given_one_by_one() -> None:
    family = present("flux")
    assert calibrate(few_blocks(family), iter(calls(family, 2)), teacache=False).calls == 2


def test_another_scheduler_has_the_same_interface() -> None:
    family = present("wan")
    plan = calibrate(family.make(scheduler=flow_euler(shift=7.0)), calls(family), teacache=False)
    assert plan.scheduler == "FlowMatchEulerDiscreteScheduler"

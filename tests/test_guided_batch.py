"""cond and uncond in one batch without a name: the adaptive cache takes them for what the scheduler is given."""

from __future__ import annotations

import functools
import gc
import threading
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import miniatures
from invariants import Interrupted, Snapshot, assert_same
from invariants.families import few_blocks, present
from sgl_diffusion_accel import (
    CachePatch,
    ConfigError,
    ConfigTypeError,
    apply_adaptive_cache,
    apply_cache_dit,
    branch,
    denoising_steps,
)
from sgl_diffusion_accel.caching.cache_patch import put_around
from sgl_diffusion_accel.caching.guided_step import GuidedStep
from sgl_diffusion_accel.intercept import intercept, release
from sgl_diffusion_accel.slots import SLOT
from sgl_diffusion_accel.targets import find_targets
from test_adaptive import LOOSE, STEPS, Looking, Watching, computed, off
from zoo.base import assemble, build, flow_euler, normal

pytestmark = pytest.mark.usefixtures("one_thread")

GUIDANCE = 4.0


# Pipelines of diffusers


def of_zoo(name: str, model: dict[str, Any] | None = None, kind: str | None = None, **given: Any) -> Any:
    """A pipeline of the zoo and its call, or one of another class around its parts."""
    family = present(name)
    pipe = family.make(**(model or {}))
    if kind is not None:
        if not hasattr(diffusers, kind):
            pytest.skip(f"diffusers {diffusers.__version__} has no {kind}")
        odd = ("image_encoder", "feature_extractor")
        parts = {part: value for part, value in pipe.components.items() if part not in odd}
        pipe = assemble(kind, **parts, pag_applied_layers=["transformer_blocks.3"])
    return pipe, family.call(pipe, **given)


def aura_flow() -> Any:
    config = {
        "in_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8, "sample_size": 8, "num_mmdit_layers": 2,
        "num_single_dit_layers": 2, "joint_attention_dim": 16, "caption_projection_dim": 16, "pos_embed_max_size": 16,
    }  # fmt: skip
    model = build("AuraFlowTransformer2DModel", 0, **config)
    pipe = assemble(
        "AuraFlowPipeline", tokenizer=None, text_encoder=None, vae=None, transformer=model, scheduler=flow_euler()
    )
    return pipe, masked(normal(2, 4, 8, 8, seed=0))


def pixart() -> Any:
    """Tells a variance as well, in as many channels again."""
    config = {
        "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8, "num_layers": 3,
        "cross_attention_dim": 16, "caption_channels": 16, "sample_size": 8, "use_additional_conditions": False,
    }  # fmt: skip
    model = build("PixArtTransformer2DModel", 0, **config)
    scheduler = diffusers.DPMSolverMultistepScheduler()
    pipe = assemble(
        "PixArtSigmaPipeline", tokenizer=None, text_encoder=None, vae=None, transformer=model, scheduler=scheduler
    )
    return pipe, {**masked(normal(2, 4, 8, 8, seed=0)), "negative_prompt": None, "use_resolution_binning": False}


def masked(latents: Tensor) -> dict[str, Any]:
    batch = len(latents)
    return {
        "prompt_embeds": normal(batch, 6, 16, seed=0, key="prompt"),
        "negative_prompt_embeds": normal(batch, 6, 16, seed=0, key="negative"),
        "prompt_attention_mask": torch.ones(batch, 6, dtype=torch.long),
        "negative_prompt_attention_mask": torch.ones(batch, 6, dtype=torch.long),
        "latents": latents,
        "height": 64,
        "width": 64,
        "num_inference_steps": 6,
        "guidance_scale": GUIDANCE,
        "output_type": "latent",
    }


def hidream() -> Any:
    """Negates what the model says."""
    config = {
        "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2, "num_single_layers": 2,
        "attention_head_dim": 8, "num_attention_heads": 4, "caption_channels": [8, 4], "text_emb_dim": 8,
        "num_routed_experts": 2, "num_activated_experts": 2, "axes_dims_rope": (4, 2, 2), "max_resolution": (8, 8),
        "llama_layers": (0, 1, 0, 1), "force_inference_output": True,
    }  # fmt: skip
    names = [f"{part}{i}" for part in ("text_encoder", "tokenizer") for i in ("", "_2", "_3", "_4")]
    model = build("HiDreamImageTransformer2DModel", 0, **config)
    pipe = assemble("HiDreamImagePipeline", **dict.fromkeys(names), vae=None, transformer=model, scheduler=flow_euler())
    pipe.default_sample_size = 8
    prompts = {
        f"{sign}{name}": normal(*shape, seed=0, key=sign + name)
        for sign in ("", "negative_")
        for name, shape in {
            "prompt_embeds_t5": (1, 7, 8), "prompt_embeds_llama3": (2, 1, 7, 4), "pooled_prompt_embeds": (1, 8),
        }.items()
    }  # fmt: skip
    rest = {"height": 64, "width": 64, "num_inference_steps": 6, "guidance_scale": GUIDANCE, "output_type": "latent"}
    return pipe, {**prompts, "latents": normal(1, 4, 8, 8, seed=0), **rest}


OF_PAG = "StableDiffusion3PAGPipeline"

PIPELINES: dict[str, Callable[[], Any]] = {
    "sd3, two prompts": functools.partial(of_zoo, "sd3", batch=2),
    "sd3, no guidance": functools.partial(of_zoo, "sd3", batch=2, guidance=1.0),
    "sd3, perturbed as well": functools.partial(of_zoo, "sd3", kind=OF_PAG, guidance=GUIDANCE),
    "sd3, perturbed alone": functools.partial(of_zoo, "sd3", kind=OF_PAG, guidance=1.0, batch=2),
    "sana, variance": functools.partial(of_zoo, "sana", {"out_channels": 16}),
    "zimage, two prompts": functools.partial(of_zoo, "zimage", batch=2),
    "zimage, a scale below 1": functools.partial(of_zoo, "zimage", guidance=0.7),
    "flux, two prompts": functools.partial(of_zoo, "flux", batch=2),
    "auraflow": aura_flow,
    "pixart": pixart,
    "hidream": hidream,
}


def steps_of(pipe: Any) -> list[Tensor]:
    """What the scheduler is given from now on, growing."""
    given: list[Tensor] = []
    step = pipe.scheduler.step

    def watched(output: Tensor, *args: Any, **kwargs: Any) -> Any:
        given.append(output.detach().double().clone())
        return step(output, *args, **kwargs)

    pipe.scheduler.step = watched
    return given


@torch.no_grad()
def measured(pipe: Any, call: dict[str, Any]) -> tuple[dict[int, float], list[Tensor]]:
    policy = Watching()
    put_around(find_targets(pipe), "watching", lambda _: policy)
    given = steps_of(pipe)
    pipe(**call)
    return policy.errors, given


def wanted(given: list[Tensor]) -> dict[int, float]:
    """Errors of the line through what the scheduler was given."""
    return {at: off(2 * given[at - 1] - given[at - 2], given[at]) for at in range(2, len(given) - 1)}


@pytest.mark.parametrize("name", PIPELINES)
def test_error_is_that_of_what_the_scheduler_is_given(name: str) -> None:
    errors, given = measured(*PIPELINES[name]())
    assert len(errors) >= 3
    assert errors == pytest.approx(wanted(given), rel=1e-3)


def test_pictures_of_one_prompt() -> None:
    pipe, call = of_zoo("sana")
    call["latents"] = torch.cat([call["latents"], normal(*call["latents"].shape, seed=3)])
    errors, given = measured(pipe, {**call, "num_images_per_prompt": 2})
    assert given[0].shape[0] == 2
    assert errors == pytest.approx(wanted(given), rel=1e-3)


def test_half_precision() -> None:
    pipe, call = of_zoo("sd3")
    pipe.to(torch.bfloat16)
    call = {key: value.bfloat16() if isinstance(value, Tensor) else value for key, value in call.items()}
    errors, given = measured(pipe, call)
    assert errors == pytest.approx(wanted(given), rel=0.05)


def test_renormalised_guidance_is_near() -> None:
    """Its scale is another one at each step, and the line is that through the guided outputs."""
    errors, given = measured(*of_zoo("zimage", cfg_normalization=1.0))
    assert errors == pytest.approx(wanted(given), rel=0.05)


def test_guidance_that_ends_in_mid_run() -> None:
    errors, given = measured(*of_zoo("zimage", cfg_truncation=0.6, steps=12))
    line = wanted(given)
    for at in range(2, 11):
        if at in errors:
            assert errors[at] == pytest.approx(line[at], rel=1e-3)
    assert len(errors) >= 6


def test_cond_and_uncond_that_are_equal() -> None:
    pipe, call = of_zoo("sd3")
    for name in ("prompt_embeds", "pooled_prompt_embeds"):
        call[f"negative_{name}"] = call[name]
    errors, given = measured(pipe, call)
    assert errors == pytest.approx(wanted(given), rel=1e-3)


def test_skip_layer_guidance_counts_its_own_call_as_right() -> None:
    """It is computed at every step, so that what is wrong in the others is all that is wrong."""
    pipe, call = of_zoo("sd3", skip_guidance_layers=[2], skip_layer_guidance_start=0.0, skip_layer_guidance_stop=1.0)
    made: list[Tensor] = []
    pipe.transformer.register_forward_hook(lambda *hook: made.append(hook[2][0].detach().double().clone()))
    errors, given = measured(pipe, call)
    both = [output for output in made if len(output) == 2]
    scale = 2.8  # the default of `skip_layer_guidance_scale`
    for at in range(2, 5):
        uncond, cond = (2 * both[at - 1] - both[at - 2] - both[at]).chunk(2)
        wrong = uncond + GUIDANCE * (cond - uncond) + scale * cond
        assert errors[at] == pytest.approx(float(wrong.norm() / given[at].norm()), rel=1e-3)


# The scheduler


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The schedulers whose next step was waited for."""
    seen: list[Any] = []
    wait = GuidedStep.wait

    def noting(self: GuidedStep, scheduler: Any) -> None:
        seen.append(scheduler)
        wait(self, scheduler)
        assert SLOT in vars(scheduler) or "step" in vars(scheduler)

    monkeypatch.setattr(GuidedStep, "wait", noting)
    return seen


@torch.no_grad()
def test_scheduler_is_left_alone_but_from_a_computed_call_to_its_step(waits: list[Any]) -> None:
    pipe, call = of_zoo("sd3", steps=12)
    pipe(**call)
    before = dict(vars(pipe.scheduler))
    kind, seen = type(pipe.scheduler), []

    def callback(pipe: Any, at: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
        seen.append((type(pipe.scheduler), SLOT in vars(pipe.scheduler)))
        return values

    patch = apply_adaptive_cache(pipe, LOOSE)
    pipe(**call, callback_on_step_end=callback)
    assert seen == [(kind, False)] * 12
    assert vars(pipe.scheduler).keys() == before.keys()
    steps = computed(patch)[0]
    # Not at the last one, after which nothing is decided.
    assert 0 < len(waits) <= sum(steps) - 1
    assert patch.held_bytes() == 0


@pytest.mark.parametrize("name", ["flux", "wan", "qwen"])
@torch.no_grad()
def test_scheduler_is_not_waited_for_where_the_batch_is_known_to_be_whole(name: str, waits: list[Any]) -> None:
    """Once a run at most: at its first call, of which it is not known whether it is the only one of its step."""
    pipe, call = of_zoo(name, batch=2, steps=STEPS)
    patch = apply_adaptive_cache(pipe, LOOSE)
    pipe(**call)
    assert len(waits) == 1
    assert not all(computed(patch)[0])


@pytest.mark.parametrize("name", ["flux", "wan"])
@torch.no_grad()
def test_one_prompt_alone_is_never_waited_for(name: str, waits: list[Any]) -> None:
    pipe, call = of_zoo(name, steps=STEPS)
    apply_adaptive_cache(pipe, LOOSE)
    pipe(**call)
    assert waits == []


def test_step_that_the_scheduler_holds_itself_stays() -> None:
    pipe, call = of_zoo("sd3")
    given = steps_of(pipe)
    mine = pipe.scheduler.step
    put_around(find_targets(pipe), "watching", lambda _: Watching())
    with torch.no_grad():
        pipe(**call)
    assert vars(pipe.scheduler)["step"] is mine
    assert len(given) == 6


@pytest.mark.parametrize("at", ["transformer", "step"])
def test_run_that_fails_between_call_and_step_leaves_the_scheduler_as_it_was(at: str) -> None:
    family = present("sd3")
    pipe = few_blocks(family)
    family.run(pipe, steps=STEPS)
    before = Snapshot(pipe)
    patch = apply_adaptive_cache(pipe, LOOSE)
    expected = family.run(pipe, steps=STEPS)
    calls: list[int] = []

    def fail() -> None:
        calls.append(1)
        if len(calls) == 6:
            raise Interrupted

    # Outside of the patch: for it the call is over, and the scheduler's step does not come.
    class Failing(Looking):
        is_watching = True

        def enter(self, *_: Any) -> None:
            if at == "step":
                fail()

        def leave(self, module: Any, token: Any, output: Any) -> Any:
            if at == "transformer":
                fail()
            return output

    if at == "transformer":
        intercept(pipe.transformer, "failing", Failing())
    else:
        intercept(pipe.scheduler, "failing", Failing(), "step")
    with pytest.raises(Interrupted):
        family.run(pipe, steps=STEPS, seed=3)
    release(pipe.transformer, "failing")
    release(pipe.scheduler, "failing", "step")
    gc.collect()
    assert patch.held_bytes() == 0
    assert SLOT not in vars(pipe.scheduler)
    assert torch.equal(family.run(pipe, steps=STEPS), expected)
    patch.remove()
    assert_same(before, pipe)


def test_patch_that_is_removed_between_call_and_step_takes_its_watch_along() -> None:
    family = present("sd3")
    pipe = few_blocks(family)
    patch = apply_adaptive_cache(pipe, LOOSE)
    calls: list[bool] = []

    class Removing(Looking):
        is_watching = True

        def leave(self, module: Any, token: Any, output: Any) -> Any:
            if len(calls) == 4:
                assert SLOT in vars(pipe.scheduler)
                patch.remove()
            calls.append(SLOT in vars(pipe.scheduler))
            return output

    intercept(pipe.transformer, "removing", Removing())
    family.run(pipe, steps=12)
    assert not any(calls[4:])


def test_two_pipelines_at_once() -> None:
    family = present("sd3")
    pipes = [few_blocks(family) for _ in range(2)]
    pipes[1].transformer = pipes[0].transformer
    patch = apply_adaptive_cache(pipes[0], LOOSE)
    expected = [family.run(pipe, steps=STEPS, seed=seed) for seed, pipe in enumerate(pipes)]
    found: dict[int, Tensor] = {}

    def work(seed: int) -> None:
        found[seed] = family.run(pipes[seed], steps=STEPS, seed=seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[seed], expected[seed]) for seed in range(2))
    assert patch.held_bytes() == 0


@pytest.mark.parametrize("name", ["sd3", "zimage"])
def test_pipeline_that_writes_into_what_it_gets(name: str) -> None:
    """The parts are those that the model gave, whatever becomes of them before the scheduler's step."""
    family = present(name)
    pipe = few_blocks(family)
    patch = apply_adaptive_cache(pipe, LOOSE)
    expected = family.run(pipe, steps=STEPS)
    steps = computed(patch)
    step = pipe.scheduler.step

    class Handing(Looking):
        is_watching = True

        def leave(self, module: Any, token: Any, output: Any) -> Any:
            self.last = output[0]
            return ([each.clone() for each in self.last] if name == "zimage" else self.last.clone(),)

    handing = Handing()

    def spoils(*args: Any, **kwargs: Any) -> Any:
        for each in handing.last:
            each.fill_(float("nan"))
        return step(*args, **kwargs)

    intercept(pipe.transformer, "handing", handing)
    pipe.scheduler.step = spoils
    assert torch.equal(family.run(pipe, steps=STEPS), expected)
    assert computed(patch) == steps


def test_whole_model_compiled() -> None:
    family = present("sd3")
    outputs, steps = [], []
    for compiles in (False, True):
        pipe = few_blocks(family)
        if compiles:
            pipe.transformer.compile(backend="eager")
        patch = apply_adaptive_cache(pipe, LOOSE)
        outputs.append(family.run(pipe, steps=STEPS))
        steps.append(computed(patch))
    assert steps[0] == steps[1]
    assert off(outputs[1], outputs[0]) < 1e-5


# Loops of one's own


Apply = Callable[[Any], CachePatch]


def by_blocks(model: Any) -> CachePatch:
    return apply_cache_dit(model, tolerance=0.008, taylorseer_order=2, fn_compute_blocks=0)


def denoise(
    name: str, way: str, steps: int, count: int = 1, apply: Apply = apply_adaptive_cache
) -> tuple[Tensor, tuple[bool, ...], set[str]]:
    """A miniature under guidance, by hand; "calls" has two named ones a step, the other ways one batch of both.

    Ways that end in "euler" step the latents themselves, so that nothing shows how the halves are combined.
    """
    pipe = miniatures.load_miniature(name)
    call = miniatures.call_kwargs(name, miniatures.captions(name, count, 5), seed=100, steps=steps)
    model, scheduler, latents = pipe.transformer, pipe.scheduler, call["latents"].clone()
    prompts = {"cond": call["prompt_embeds"], "uncond": call["negative_prompt_embeds"]}
    scheduler.set_timesteps(steps)
    patch = apply(model)

    def ask(*names: str) -> list[Tensor]:
        text = torch.cat([prompts[each] for each in names])
        both = torch.cat([latents] * len(names))
        return list(model(both, t.expand(len(both)), text, return_dict=False)[0].chunk(len(names)))

    with torch.no_grad():
        for i, t in enumerate(denoising_steps(scheduler.timesteps, scheduler=scheduler, guidance=GUIDANCE)):
            if way == "calls":
                with branch("cond"):
                    (cond,) = ask("cond")
                with branch("uncond"):
                    (uncond,) = ask("uncond")
            elif way == "cond first":
                cond, uncond = ask("cond", "uncond")
            elif way == "named, cond first, euler":
                with branch("cond", "uncond"):
                    cond, uncond = ask("cond", "uncond")
            elif way == "named, euler":
                with branch("uncond", "cond"):
                    uncond, cond = ask("uncond", "cond")
            else:
                uncond, cond = ask("uncond", "cond")
            guided = uncond + GUIDANCE * (cond - uncond)
            if way.endswith("euler"):
                latents = latents + (scheduler.sigmas[i + 1] - scheduler.sigmas[i]) * guided
            else:
                latents = scheduler.step(guided, t, latents, return_dict=False)[0]
    branches = patch.stats.runs[-1].branches
    (decided,) = {each.computed for each in branches.values()}
    return latents, decided, set(branches)


@functools.cache
def in_calls(steps: int, count: int, apply: Apply = apply_adaptive_cache) -> tuple[Tensor, tuple[bool, ...], set[str]]:
    return denoise("wan", "calls", steps, count, apply)


@pytest.mark.parametrize(
    ("way", "steps", "count"),
    [
        ("uncond first", 20, 2),
        ("cond first", 20, 1),
        ("named, euler", 20, 1),
        ("named, cond first, euler", 20, 1),
    ],
)
def test_one_batch_is_decided_as_two_calls_are(way: str, steps: int, count: int) -> None:
    """The same trained model, captions and noise."""
    latents, decided, _ = in_calls(steps, count)
    one, found, _ = denoise("wan", way, steps, count)
    assert found == decided
    assert not all(found)
    assert off(one, latents) < 1e-3


@pytest.mark.parametrize("way", ["cond first", "named, cond first, euler"])
def test_gap_control_of_blocks_decides_one_batch_as_two_calls(way: str) -> None:
    latents, decided, _ = in_calls(20, 1, by_blocks)
    one, found, _ = denoise("wan", way, 20, 1, by_blocks)
    assert found == decided
    assert not all(found)
    assert off(one, latents) < 1e-3


def test_gap_control_of_blocks_with_nothing_that_tells() -> None:
    assert sum(denoise("wan", "euler", 20, 1, by_blocks)[1]) < sum(in_calls(20, 1, by_blocks)[1])


@pytest.mark.parametrize("name", ["zimage", "flux"])
def test_gap_control_of_blocks_on_a_pipeline(name: str, waits: list[Any]) -> None:
    family = present(name)
    pipe = family.make()
    family.run(pipe, steps=STEPS)
    before = Snapshot(pipe)
    patch = apply_cache_dit(pipe, tolerance=0.1, taylorseer_order=2, fn_compute_blocks=0)
    family.run(pipe, steps=STEPS)
    assert bool(waits) == (name != "flux")
    assert not all(computed(patch)[0])
    assert patch.held_bytes() == 0
    patch.remove()
    assert_same(before, pipe)


def test_nothing_tells_where_neither_a_name_nor_a_step_does() -> None:
    """Then it is taken for one branch, whose error guidance makes larger: fewer steps are computed."""
    _, decided, _ = in_calls(20, 1)
    _, found, names = denoise("wan", "euler", 20, 1)
    assert sum(found) < sum(decided)
    assert names == {"cond"}


def test_names_of_both_branches_stand_in_the_statistics() -> None:
    assert denoise("wan", "named, euler", 10)[2] == {"uncond+cond"}


@pytest.mark.parametrize("names", [("cond", "other"), ("cond", "cond"), ("cond", "uncond", "cond"), ("a", "b")])
def test_only_the_two_branches_of_guidance_share_a_batch(names: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=r"allowed: 'uncond' and 'cond', .* Type: branch\('uncond', 'cond'\)"):
        branch(*names)


def test_each_of_several_names_is_checked() -> None:
    with pytest.raises(ConfigError, match="is empty"):
        branch("cond", " ")
    with pytest.raises(ConfigTypeError, match="a float; allowed: a string"):
        branch("cond", 4.0)  # type: ignore[arg-type]
    assert branch(" uncond", "cond ").name == "uncond+cond"


def test_batch_that_cannot_be_halved_is_refused_under_two_names() -> None:
    family = present("wan")
    pipe = family.make()
    patch = apply_adaptive_cache(pipe)
    given = family.bare(pipe, batch=3)
    with torch.no_grad(), pytest.raises(ConfigError, match="has a batch of 3, which does not hold two branches"):
        for _ in denoising_steps(torch.linspace(1000, 1, 20)):
            with branch("uncond", "cond"):
                pipe.transformer(**given)
    assert patch.held_bytes() == 0

"""The front door of TeaCache: what it refuses, what it chooses, what it says, and short runs."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

from invariants import CACHES, Snapshot, assert_same, families, skips_some
from invariants.families import present
from sgl_diffusion_accel import (
    CachePatch,
    ConfigError,
    ConfigTypeError,
    TeaCacheCoefficients,
    TeaCacheConfig,
    UnsupportedModelError,
    apply_cache_dit,
    apply_teacache,
    remove,
)
from sgl_diffusion_accel.caching.run_log import few_steps_remark
from zoo import Family
from zoo.base import assemble, build, flow_euler, normal
from zoo.wan import CONFIG, TEXT

LINEAR = [0, 0, 0, 1, 0]
THIRDS: dict[str, Any] = {"teacache_thresh": 0.25, "coefficients": [0, 0, 0, 0, 0.1]}
"""Computes every third step."""


def marks(patch: CachePatch, branch: str = "cond") -> str:
    """The last run's steps of a branch: # computed, . skipped."""
    return "".join("#" if computed else "." for computed in patch.stats.runs[-1].branches[branch].computed)


# What is refused

REFUSED: dict[str, tuple[str, dict[str, Any], type[Exception], str]] = {
    "model without coefficients": (
        "qwen",
        {},
        ConfigError,
        r"no TeaCache coefficients are published for QwenImageTransformer2DModel.*fit_teacache\(pipe, calls\)"
        r".*apply_teacache\(pipe, '2x', coefficients=coefficients\).*coefficients=\[\.\.\.\] and teacache_thresh=",
    ),
    "model of a family, without coefficients": (
        "wan",
        {"config": {"in_channels": 48, "out_channels": 48}},
        ConfigError,
        r"published for WanTransformer3DModel as it is configured.*variant='wan2\.1-t2v-1\.3b'",
    ),
    "unknown variant": (
        "wan",
        {"variant": "wan2.1-t2v-1.3"},
        ConfigError,
        r"unknown variant 'wan2\.1-t2v-1\.3'\. Did you mean 'wan2\.1-t2v-1\.3b'\? Known: .*flux\.1-dev",
    ),
    "variant of another signal": (
        "wan",
        {"variant": "flux.1-dev"},
        ConfigError,
        r"variant='flux\.1-dev' was fitted on another signal than that of WanTransformer3DModel; allowed: wan2\.1-t2v",
    ),
    "variant for a model that has none": (
        "qwen",
        {"variant": "flux.1-dev"},
        ConfigError,
        r"another signal than that of QwenImageTransformer2DModel; none are known for it\..*fit_teacache\(",
    ),
    "signal of Wan for FLUX": (
        "flux",
        {"use_ret_steps": True},
        ConfigError,
        r"use_ret_steps=True is a choice .* of Wan; FluxTransformer2DModel has one signal.*start_skipping=5",
    ),
    "signal that the coefficients were not fitted on": (
        "wan",
        {
            "use_ret_steps": True,
            "coefficients": TeaCacheCoefficients((0, 0, 0, 1, 0), {2.0: 0.1}, use_ret_steps=False),
        },
        ConfigError,
        r"use_ret_steps=True, and the coefficients were fitted with use_ret_steps=False",
    ),
    "settings of a second expert that is not there": (
        "wan",
        {"secondary": {"teacache_thresh": 0.1}},
        ConfigError,
        r"secondary=\{'teacache_thresh': 0\.1\} is for transformer_2, and WanPipeline has none\. Leave secondary out",
    ),
    "unknown setting": (
        "wan",
        {"teacache_tresh": 0.1},
        ConfigError,
        r"unknown setting 'teacache_tresh' in apply_teacache\. Did you mean 'teacache_thresh'\?",
    ),
    "unknown setting of the second expert": (
        "wan22",
        {"secondary": {"start_skip": 5}},
        ConfigError,
        r"unknown setting 'start_skip' in secondary\. Did you mean 'start_skipping'\?",
    ),
    "config of another type": (
        "wan",
        {"config": 0.1j},
        ConfigTypeError,
        r"teacache_thresh=0\.1j is a complex; allowed: a positive number",
    ),
    "config in place of the threshold": (
        "wan",
        {"teacache_thresh": TeaCacheConfig()},
        ConfigTypeError,
        r"teacache_thresh=.* is a TeaCacheConfig; allowed: a positive number",
    ),
    "coefficients without a threshold": (
        "wan",
        {"coefficients": LINEAR},
        ConfigError,
        r"no threshold is known for coefficients=\[0\.0, 0\.0, 0\.0, 1\.0, 0\.0\]\..*teacache_thresh=0\.1",
    ),
    "speed-up that is not known": (
        "wan",
        {"teacache_thresh": "9x"},
        ConfigError,
        r"teacache_thresh='9x': none is known for that\. Known: '1\.5x' \(0\.05\), .*'2x' \(0\.08\); or give a number",
    ),
    "speed-up that is known for the first expert alone": (
        "wan22",
        {"teacache_thresh": "1.6x", "secondary": {"coefficients": LINEAR}},
        ConfigError,
        r"no threshold is known for coefficients=\[0\.0",
    ),
    "window without a step": (
        "wan",
        {"start_skipping": 7, "end_skipping": 3},
        ConfigError,
        r"start_skipping=7 and end_skipping=3 leave no step to skip",
    ),
}


@pytest.mark.parametrize(("name", "settings", "error", "match"), REFUSED.values(), ids=REFUSED)
def test_refusal_says_what_to_type_and_leaves_everything_as_it_was(
    name: str, settings: dict[str, Any], error: type[Exception], match: str
) -> None:
    family = present(name)
    config = settings.get("config")
    if isinstance(config, dict):
        pipe, settings = family.make(**config), {}
    else:
        pipe = family.make()
    before = Snapshot(pipe)
    with pytest.raises(error, match=match):
        apply_teacache(pipe, **settings)
    assert_same(before, pipe)


def test_refusal_leaves_the_patch_in_place() -> None:
    family = present("wan22")
    pipe = family.make()
    patch = apply_teacache(pipe, **THIRDS)
    output = family.run(pipe)
    before = Snapshot(pipe)
    for settings in ({"variant": "wan"}, {"secondary": {"teacache_thresh": "7x"}}, {"teacache_tresh": 1}):
        with pytest.raises(ConfigError):
            apply_teacache(pipe, **settings)
        assert patch.active
        assert_same(before, pipe)
    assert torch.equal(family.run(pipe), output)


class UNetPipe(DiffusionPipeline):
    def __init__(self, unet: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)


def test_pipeline_without_a_transformer_is_refused() -> None:
    pipe = UNetPipe(nn.Linear(2, 2), flow_euler())
    with pytest.raises(UnsupportedModelError, match=r"UNetPipe has no component 'transformer'.*modules are unet.*UNet"):
        apply_teacache(pipe, 0.1)


@pytest.mark.parametrize("other", [None, "wan", 3, {"transformer": nn.Linear(2, 2)}])
def test_what_is_no_pipeline_is_refused(other: Any) -> None:
    with pytest.raises(ConfigTypeError, match=f"got {type(other).__name__}"):
        apply_teacache(other, 0.1)


class Bare(nn.Module):
    """Has blocks, and no attention in them whose input could be seen: only a norm in front of one."""

    def __init__(self) -> None:
        super().__init__()
        parts = ({"attention_norm": nn.LayerNorm(2), "linear": nn.Linear(2, 2)} for _ in range(3))
        self.blocks = nn.ModuleList(map(nn.ModuleDict, parts))


def test_model_without_attention_is_refused_by_the_name_of_its_block() -> None:
    transformer = Bare()
    with pytest.raises(UnsupportedModelError, match=r"ModuleDict has no attention.*apply_cache_dit"):
        apply_teacache(transformer, 0.1, coefficients=LINEAR)
    assert type(transformer) is Bare


def test_cache_of_diffusers_is_refused() -> None:
    pipe = present("wan").make()
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(UnsupportedModelError, match=r"pipe\.transformer\.disable_cache\(\)"):
        apply_teacache(pipe)


# What is taken


def test_threshold_may_be_given_by_position_by_name_and_in_a_config() -> None:
    family = present("wan")
    given: list[Callable[[Any], CachePatch]] = [
        lambda pipe: apply_teacache(pipe, 0.06, coefficients=LINEAR),
        lambda pipe: apply_teacache(pipe, teacache_thresh=0.06, coefficients=LINEAR),
        lambda pipe: apply_teacache(pipe, config=TeaCacheConfig(0.06, LINEAR)),
        lambda pipe: apply_teacache(pipe, TeaCacheConfig(0.9, LINEAR), teacache_thresh=0.06),
        lambda pipe: apply_teacache(pipe, "1.5x", coefficients=TeaCacheCoefficients(LINEAR, {1.5: 0.06, 3.0: 0.9})),
    ]
    outputs, patterns = [], set()
    for apply in given:
        pipe = family.make()
        patch = apply(pipe)
        outputs.append(family.run(pipe, steps=10))
        patterns.add(marks(patch))
    assert len(patterns) == 1
    assert {"#", "."} == set(patterns.pop()[1:-1])
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_settings_go_over_those_of_a_config_that_stays_as_it_is() -> None:
    pipe = present("wan").make()
    config = TeaCacheConfig(0.1, use_ret_steps=True, taylorseer_order=2)
    patch = apply_teacache(pipe, config=config, end_skipping=0.5, taylorseer_order=1)
    assert "threshold 0.1, projected time embedding" in str(patch)
    assert "start_skipping=5, end_skipping=0.5, TaylorSeer order 1" in str(patch)
    assert config == TeaCacheConfig(0.1, use_ret_steps=True, taylorseer_order=2)


@families("wan", "flux")
def test_transformer_by_itself(family: Family) -> None:
    whole, pipe = family.make(), family.make()
    apply_teacache(whole, **THIRDS)
    patch = apply_teacache(pipe.transformer, **THIRDS)
    assert torch.equal(family.run(pipe), family.run(whole))
    assert marks(patch) == "#..#.#"


def test_one_of_two_experts_by_itself() -> None:
    family = present("wan22")
    pipe = family.make()
    patch = apply_teacache(pipe.transformer_2, **THIRDS)
    family.run(pipe, steps=12)
    assert marks(patch) == "#..#.#"
    remove(pipe)
    assert not patch.active


def test_taylor_prediction_differs_from_reuse_by_the_output_alone() -> None:
    family = present("wan")
    outputs = []
    for order in (0, 1, 2):
        pipe = family.make()
        patch = apply_teacache(pipe, **THIRDS, taylorseer_order=order)
        assert ("TaylorSeer" in str(patch)) == bool(order)
        outputs.append(family.run(pipe, steps=12))
        assert marks(patch) == "#..#..#..#.#"
    assert not torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[1], outputs[2])


def test_second_expert_may_differ_in_every_setting() -> None:
    family = present("wan22")
    pipe = family.make()
    own = {"start_skipping": 8, "use_ret_steps": True, "taylorseer_order": 1, "teacache_thresh": 0.35}
    patch = apply_teacache(pipe, **THIRDS, secondary=own)
    family.run(pipe, steps=12)
    assert marks(patch) == "#..#.." + "##...#"
    first, second = re.findall(r"(transformer\w*: .*?)(?:; |\)$)", str(patch).splitlines()[0])
    assert first == "transformer: own coefficients, threshold 0.25, time embedding, " + (
        "start_skipping=1, end_skipping=-1, reuse"
    )
    assert second == "transformer_2: own coefficients, threshold 0.35, projected time embedding (use_ret_steps), " + (
        "start_skipping=8, end_skipping=-1, TaylorSeer order 1"
    )


def test_fit_of_two_experts_gives_each_its_own() -> None:
    family = present("wan22")
    pipe = family.make()
    fit = TeaCacheCoefficients((0, 0, 0, 0, 0.1), {2.0: 0.15}, secondary=TeaCacheCoefficients(LINEAR, {2.0: 9.0}))
    patch = apply_teacache(pipe, "2x", coefficients=fit)
    family.run(pipe, steps=12)
    assert marks(patch) == "#.#.#." + "#....#"


# What is chosen

CHOSEN: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "wan": ("wan", {}, {}, "wan2.1-t2v-1.3b, threshold 0.05 for 1.5x, time embedding, start_skipping=1"),
    "wan, large": (
        "wan",
        {"num_attention_heads": 40, "attention_head_dim": 128},
        {"teacache_thresh": "2x"},
        "wan2.1-t2v-14b, threshold 0.2 for 2x, time embedding",
    ),
    "wan, retention": (
        "wan",
        {},
        {"use_ret_steps": True},
        "wan2.1-t2v-1.3b, threshold 0.05 for 1.6x, projected time embedding (use_ret_steps), start_skipping=5",
    ),
    "wan, variant": ("wan", {}, {"variant": "wan2.1-i2v-720p"}, "wan2.1-i2v-720p, threshold 0.18 for 1.7x, time"),
    "flux": ("flux", {}, {"teacache_thresh": 0.3}, "flux.1-dev, threshold 0.3, modulated input"),
    "hunyuan": ("hunyuan", {}, {}, "hunyuanvideo, threshold 0.1 for 1.6x, modulated input"),
    "cogvideox": ("cogvideox", {}, {}, "cogvideox-5b, threshold 0.1 for 1.6x, time embedding"),
    "cogvideox, sines": (
        "cogvideox",
        {"use_rotary_positional_embeddings": False},
        {},
        "cogvideox-2b, threshold 0.1 for 1.6x, time embedding",
    ),
    "cogvideox, 1.5": (
        "cogvideox",
        {"patch_size_t": 2},
        {},
        "cogvideox1.5-5b, threshold 0.1 for 1.3x, time embedding",
    ),
    "cogvideox, 1.5 from a picture": (
        "cogvideox",
        {"patch_size_t": 2, "ofs_embed_dim": 512},
        {},
        "cogvideox1.5-5b-i2v, threshold 0.1 for 1.3x, time embedding",
    ),
    "ltx": ("ltx", {}, {}, "ltx-video, threshold 0.03 for 1.6x, modulated input"),
    "mochi": ("mochi", {}, {}, "mochi-1, threshold 0.06 for 1.5x, modulated input"),
    "lumina2": ("lumina2", {}, {}, "lumina2, threshold 0.2 for 1.5x, modulated input"),
    "qwen": (
        "qwen",
        {},
        {"teacache_thresh": 0.2, "coefficients": LINEAR},
        "own coefficients, threshold 0.2, modulated",
    ),
}


@pytest.mark.parametrize(("name", "config", "settings", "said"), CHOSEN.values(), ids=CHOSEN)
def test_choice_is_logged_once_and_is_in_the_summary(
    name: str, config: dict[str, Any], settings: dict[str, Any], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    family = present(name)
    pipe = family.make()
    pipe.transformer.register_to_config(**config)  # in words alone: the model stays small
    with caplog.at_level(logging.INFO, "sgl_diffusion_accel"):
        patch = apply_teacache(pipe, **settings)
        if not config:
            family.run(pipe, steps=3)
            family.run(pipe, steps=3)
    assert said in str(patch).splitlines()[0]
    assert str(patch).startswith(f"TeaCache ({said}")
    logged = [record.getMessage() for record in caplog.records if "TeaCache on" in record.getMessage()]
    assert len(logged) == 1
    assert logged[0].startswith(f"TeaCache on transformer: {said}")


def test_choice_for_two_experts_is_logged_for_each(caplog: pytest.LogCaptureFixture) -> None:
    pipe = present("wan22").make()
    with caplog.at_level(logging.INFO, "sgl_diffusion_accel"):
        patch = apply_teacache(pipe)
    assert [record.getMessage().split(",")[0] for record in caplog.records] == [
        "TeaCache on transformer: wan2.1-t2v-1.3b",
        "TeaCache on transformer_2: wan2.1-t2v-1.3b",
    ]
    assert str(patch).splitlines()[0].count("wan2.1-t2v-1.3b") == 1, "said once where both have the same"


SIZES = {(64, 64, 1): "480p", (480, 832, 1): "480p", (720, 1280, 1): "720p", (1280, 720, 1): "720p"}
BY_SIZE = {
    "480p": "transformer: by the resolution: wan2.1-i2v-480p, threshold 0.13 for 1.6x",
    "720p": "transformer: by the resolution: wan2.1-i2v-720p, threshold 0.18 for 1.7x",
}


def test_image_to_video_coefficients_go_by_the_resolution_of_each_run(caplog: pytest.LogCaptureFixture) -> None:
    """Wan 2.1 has a model for each resolution, and nothing in its config tells the two apart."""
    family = present("wan")
    pipe = family.make(image_dim=8, num_layers=1, rope_max_seq_len=128)
    with caplog.at_level(logging.INFO, "sgl_diffusion_accel"):
        patch = apply_teacache(pipe)
        title = str(patch).splitlines()[0]
        assert "wan2.1-i2v-480p, threshold 0.13 for 1.6x or wan2.1-i2v-720p, threshold 0.18 for 1.7x" in title
        for size, name in (*SIZES.items(), *SIZES.items()):
            family.run(pipe, steps=3, size=size, guidance=1)
            component, _, remark = BY_SIZE[name].partition(": ")
            assert patch.stats.runs[-1].remarks[0] == (component, remark)
            assert BY_SIZE[name] in str(patch).splitlines()[-2:][0]
            assert "wan2.1-i2v-" + name in patch._repr_html_().split("<table")[1]
    logged = [record.getMessage() for record in caplog.records if "resolution" in record.getMessage()]
    assert sorted(logged) == sorted(BY_SIZE.values())


def test_resolution_decides_the_polynomial_and_the_threshold() -> None:
    """Not only what is said of it."""
    family = present("wan")
    for size, name in {(64, 64, 1): "480p", (720, 1280, 1): "720p"}.items():
        patterns = []
        for variant in (None, "wan2.1-i2v-480p", "wan2.1-i2v-720p"):
            pipe = family.make(image_dim=8, num_layers=1, rope_max_seq_len=128)
            patch = apply_teacache(pipe, 0.4, start_skipping=1, use_ret_steps=True, variant=variant)
            family.run(pipe, steps=8, size=size, guidance=1)
            patterns.append(marks(patch))
            remarks = [remark for _, remark in patch.stats.runs[-1].remarks if remark != few_steps_remark(8)]
            assert len(remarks) == (variant is None)
        assert patterns[1] != patterns[2]
        assert patterns[0] == patterns[1 if name == "480p" else 2]


@pytest.mark.skipif(not hasattr(diffusers, "WanImageToVideoPipeline"), reason="no WanImageToVideoPipeline")
def test_image_to_video_pipeline() -> None:
    """Its transformer takes the picture's latents and a mask beside the noise: more channels in than out."""
    noise = 4
    pipe = assemble(
        "WanImageToVideoPipeline",
        tokenizer=None,
        text_encoder=None,
        image_processor=None,
        image_encoder=None,
        vae=build(
            "AutoencoderKLWan",
            0,
            base_dim=4,
            z_dim=noise,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            latents_mean=[0.0] * noise,
            latents_std=[1.0] * noise,
        ),
        scheduler=flow_euler(),
        transformer=build("WanTransformer3DModel", 0, **{**CONFIG, "in_channels": 3 * noise, "num_layers": 2}),
    )

    def run() -> torch.Tensor:
        return pipe(
            image=normal(1, 3, 64, 64, seed=0, key="picture").sigmoid(),
            prompt_embeds=normal(1, 7, TEXT, seed=0, key="prompt"),
            negative_prompt_embeds=normal(1, 7, TEXT, seed=0, key="negative"),
            height=64,
            width=64,
            num_frames=5,
            num_inference_steps=4,
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
            return_dict=False,
        )[0]

    expected = run()
    with apply_teacache(pipe, **THIRDS) as patch:
        assert not torch.equal(run(), expected)
        assert marks(patch) == marks(patch, "uncond") == "#..#"
    with apply_teacache(pipe) as patch:
        run()
        assert BY_SIZE["480p"] in str(patch)
    assert torch.equal(run(), expected)


# Short runs


@families("wan", "flux", "cogvideox")
def test_short_runs_compute_the_first_and_the_last_step(family: Family) -> None:
    pipe = family.make()
    unpatched = {steps: family.run(pipe, steps=steps) for steps in (1, 2)}
    patch = apply_teacache(pipe, 0.5, coefficients=[0, 0, 0, 0, 0])
    expected = {1: "#", 2: "##", 3: "#.#", 4: "#..#", 8: "#......#"}
    for steps, pattern in expected.items():
        output = family.run(pipe, steps=steps)
        assert {marks(patch, branch) for branch in patch.stats.runs[-1].branches} == {pattern}
        assert patch.held_bytes() == 0
        remarks = patch.stats.runs[-1].remarks
        if steps > 2:
            assert remarks == [("transformer", few_steps_remark(steps))]
            continue
        assert torch.equal(output, unpatched[steps])
        ((component, remark),) = remarks
        assert component == "transformer"
        assert remark.startswith(f"a run of {steps} steps has none that may be skipped")
        assert remark in str(patch)


def test_retention_steps_leave_nothing_to_skip_in_six_steps_and_say_so_once(caplog: pytest.LogCaptureFixture) -> None:
    family = present("wan22")
    pipe = family.make()
    patch = apply_teacache(pipe, 0.5, coefficients=[0, 0, 0, 0, 0], use_ret_steps=True)
    with caplog.at_level(logging.WARNING, "sgl_diffusion_accel"):
        for _ in range(2):
            family.run(pipe)
            assert marks(patch) == "######"
            assert [component for component, _ in patch.stats.runs[-1].remarks] == ["transformer", "transformer_2"]
    assert len(caplog.records) == 2
    assert "(start_skipping=5, end_skipping=-1)" in caplog.text
    family.run(pipe, steps=8)
    assert marks(patch) == "#####..#"
    assert {remark for _, remark in patch.stats.runs[-1].remarks} == {few_steps_remark(8)}


# What is shown


def test_picture_for_a_notebook() -> None:
    family = present("flux")
    pipe = family.make()
    patch = apply_teacache(pipe, **THIRDS)
    assert "no run yet" in patch._repr_html_()
    family.run(pipe)
    page = patch._repr_html_()
    assert "<b>TeaCache (own coefficients, threshold 0.25, modulated input" in page
    assert page.count("background:#0072B2") == 3
    assert page.count("background:#DCE2E7") == 3
    assert "title='step 1: accumulated change below threshold'" in page
    assert "title='step 3: accumulated change'" in page
    patch.remove()
    assert "(removed)" in patch._repr_html_()


def test_reasons_and_changes_of_each_step() -> None:
    family = present("flux")
    pipe = family.make()
    patch = apply_teacache(pipe, **THIRDS, start_skipping=2)
    family.run(pipe, steps=7)
    branch = patch.stats.runs[-1].branches["cond"]
    below, reached, outside = "accumulated change below threshold", "accumulated change", "outside the window"
    assert branch.reasons == ("nothing to reuse", outside, below, below, reached, below, outside)
    assert [change is None for change in branch.changes] == [True, True, False, False, False, False, True]
    assert all(change > 0 for change in branch.changes if change is not None)
    assert patch.stats.runs[-1].compute_share == pytest.approx(4 / 7)


# Other patches


@families("wan", "flux", "wan22")
def test_replaces_another_cache_and_is_replaced(family: Family) -> None:
    pipe = family.make()
    expected = family.run(pipe)
    before = Snapshot(pipe)
    alone = {}
    for name in ("reuse", "teacache, Taylor"):
        with CACHES[name](pipe):
            alone[name] = family.run(pipe)
    dbcache = CACHES["reuse"](pipe)
    tea = CACHES["teacache, Taylor"](pipe)
    assert (dbcache.active, tea.active) == (False, True)
    assert torch.equal(family.run(pipe), alone["teacache, Taylor"])
    assert skips_some(tea)
    again = CACHES["reuse"](pipe)
    assert (tea.active, again.active) == (False, True)
    assert torch.equal(family.run(pipe), alone["reuse"])
    assert (len(dbcache.stats.runs), len(tea.stats.runs), len(again.stats.runs)) == (0, 1, 1)
    tea.remove()
    assert again.active
    remove(pipe)
    assert_same(before, pipe)
    assert torch.equal(family.run(pipe), expected)


def test_with_block_undoes_also_on_an_error() -> None:
    family = present("flux")
    pipe = family.make()
    expected = family.run(pipe)
    before = Snapshot(pipe)
    with apply_teacache(pipe, **THIRDS) as patch:
        assert patch.active
        assert not torch.equal(family.run(pipe), expected)
    assert not patch.active
    assert_same(before, pipe)
    with pytest.raises(KeyboardInterrupt), apply_teacache(pipe, **THIRDS):
        raise KeyboardInterrupt
    assert_same(before, pipe)
    assert torch.equal(family.run(pipe), expected)


def test_config_of_the_other_cache_is_refused() -> None:
    pipe = present("wan").make()
    from sgl_diffusion_accel import CacheDiTConfig

    with pytest.raises(ConfigTypeError, match="the second argument is a CacheDiTConfig; allowed: a TeaCacheConfig"):
        apply_teacache(pipe, config=CacheDiTConfig())
    with pytest.raises(ConfigTypeError):
        apply_cache_dit(pipe, TeaCacheConfig())


def test_run_of_another_length_than_the_fitted_ones_is_remarked_on() -> None:
    family = present("wan")
    pipe = family.make()
    fit = TeaCacheCoefficients((0, 0, 0, 1, 0), steps=12)
    patch = apply_teacache(pipe, 0.1, coefficients=fit)
    for steps, is_remarked in ((12, False), (11, False), (6, True)):
        family.run(pipe, steps=steps)
        remarks = [remark for _, remark in patch.stats.runs[-1].remarks]
        assert any("fitted on runs of 12 steps, and this one has 6" in remark for remark in remarks) is is_remarked
    assert "fitted on runs of 12 steps" in str(patch)


def test_speedup_that_one_of_two_resolutions_lacks_is_taken_where_it_is_known(caplog) -> None:
    pipe = present("wan").make(in_channels=36, out_channels=16)
    with apply_teacache(pipe, "1.6x") as patch:
        assert "wan2.1-i2v-480p, threshold 0.13 for 1.6x or wan2.1-i2v-720p, threshold 0.18 for 1.7x" in str(patch)
    assert "no threshold is known for 1.6x: taken is that for 1.7x" in caplog.text
    with pytest.raises(ConfigError, match=r"wan2.1-i2v-480p: .*wan2.1-i2v-720p: "):
        apply_teacache(pipe, "9x")


def test_single_settings_go_over_the_config_even_where_they_exclude_each_other() -> None:
    pipe = present("flux").make()
    config = TeaCacheConfig(0.3, coefficients=(0, 0, 0, 1, 0))
    with apply_teacache(pipe, variant="flux.1-dev", config=config) as patch:
        assert "flux.1-dev, threshold 0.3" in str(patch)

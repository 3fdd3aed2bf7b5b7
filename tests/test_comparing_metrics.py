"""Metrics: right on known values, and every one of them ranks growing damage as growing damage."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from sgl_diffusion_accel.comparing.measures import metrics, perceptual
from sgl_diffusion_accel.comparing.measures.perceptual import Lpips
from sgl_diffusion_accel.comparing.measures.quality import Judge
from sgl_diffusion_accel.comparing.measures.read_output import Media
from sgl_diffusion_accel.errors import ConfigError

STRENGTHS = (0.1, 0.2, 0.4, 0.8)


def clip(frames=6, side=48):
    """A disc and stripes that move over a gradient: edges, texture and motion."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, side), torch.linspace(-1, 1, side), indexing="ij")
    found = []
    for frame in range(frames):
        shift = frame * 0.08
        disc = ((x - shift) ** 2 + y**2 < 0.3).float()
        stripes = 0.5 + 0.5 * torch.sin(20 * (y + shift))
        found.append(torch.stack([0.2 + 0.6 * disc, 0.3 * stripes + 0.3, 0.5 + 0.4 * x * (1 - disc)]))
    return torch.stack(found)[None].clamp(0, 1)


def blur(values, strength):
    sigma = 4 * strength
    radius = 7
    kernel = torch.exp(-(torch.arange(-radius, radius + 1) ** 2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
    frames = F.pad(values.flatten(0, 1), (radius,) * 4, mode="reflect")
    frames = F.conv2d(F.conv2d(frames, kernel, groups=3), kernel.transpose(-1, -2), groups=3)
    return frames.reshape(values.shape)


def noise(values, strength):
    drawn = torch.randn(values.shape, generator=torch.Generator().manual_seed(0))
    return (values + 0.3 * strength * drawn).clamp(0, 1)


def frozen(values, strength):
    """Every frame is drawn towards the first one."""
    return values + strength * (values[:, :1] - values)


def shifted(values, strength):
    return (values + 0.4 * strength * torch.tensor([1.0, -0.5, 0.3]).view(3, 1, 1)).clamp(0, 1)


def measured(damage):
    reference = Media(clip(), "pixels")
    judge = Judge()
    return [judge(Media(damage(reference.values, strength), "pixels"), reference) for strength in STRENGTHS]


def falls(values):
    return all(before > after for before, after in pairwise(values))


@pytest.mark.parametrize("damage", [blur, noise, frozen, shifted])
def test_psnr_and_ssim_rank_every_growing_damage(damage):
    found = measured(damage)
    assert falls([each.psnr for each in found])
    assert falls([each.ssim for each in found])


def test_sharpness_falls_with_blur_and_rises_with_noise():
    assert falls([1.0, *(each.sharpness for each in measured(blur))])
    assert falls([-1.0, *(-each.sharpness for each in measured(noise))])


def test_motion_falls_as_a_clip_freezes_and_rises_with_flicker():
    found = [each.motion for each in measured(frozen)]
    assert found == pytest.approx([1 - strength for strength in STRENGTHS], abs=1e-5)
    assert measured(lambda values, _: values[:, :1].expand_as(values))[0].motion == 0
    assert falls([-1.0, *(-each.motion for each in measured(noise))])


def test_a_still_picture_has_no_motion_and_a_still_reference_no_ratio():
    picture = clip(frames=1)
    assert metrics.motion(picture, picture) is None
    still = clip(frames=1).repeat(1, 3, 1, 1, 1)
    assert metrics.motion(still, still) == 1
    assert metrics.motion(clip(frames=3), still) == math.inf


@pytest.mark.parametrize("error", [0.1, 0.01, 1e-4])
def test_psnr_is_the_definition(error):
    reference = clip().double()
    assert metrics.psnr(reference + error, reference) == pytest.approx(-20 * math.log10(error), abs=1e-6)
    assert metrics.psnr(reference + error, reference, peak=2.0) == pytest.approx(-20 * math.log10(error / 2), abs=1e-6)


def test_equal_outputs_are_infinitely_near():
    assert metrics.psnr(clip(), clip()) == math.inf
    assert metrics.ssim(clip(), clip()) == 1.0
    assert metrics.sharpness(clip(), clip()) == metrics.motion(clip(), clip()) == 1.0


def test_uint8_does_not_wrap():
    dark, bright = (torch.full((1, 1, 3, 16, 16), value, dtype=torch.uint8) for value in (3, 250))
    assert metrics.psnr(dark, bright) == metrics.psnr(bright, dark) == pytest.approx(-20 * math.log10(247 / 255))
    floats = (dark / 255, bright / 255)
    assert metrics.psnr(*floats) == pytest.approx(metrics.psnr(dark, bright), abs=1e-4)
    assert metrics.ssim(dark, bright) == pytest.approx(metrics.ssim(*floats), abs=1e-5)


def test_nan_is_told_and_not_hidden():
    reference = Media(clip(), "pixels")
    broken = reference.values.clone()
    broken[0, 0, 0, 0, :12] = math.nan
    found = Judge()(Media(broken, "latents"), reference)
    assert math.isnan(found.psnr)
    assert math.isnan(found.ssim)
    assert math.isnan(found.sharpness)
    assert math.isnan(found.motion)
    assert found.non_finite == pytest.approx(12 / broken.numel())


def test_mean_psnr_counts_an_equal_output_as_100_db():
    assert metrics.mean_psnr([math.inf, math.inf]) == math.inf
    assert metrics.mean_psnr([math.inf, 40.0]) == 70.0
    assert metrics.mean_psnr([120.0, 40.0]) == 70.0
    assert math.isnan(metrics.mean_psnr([math.nan, math.inf]))


def test_frames_one_by_one_have_the_mean_of_all_at_once():
    from torchmetrics.functional.image import structural_similarity_index_measure

    reference, other = clip(), noise(clip(), 0.3)
    at_once = structural_similarity_index_measure(other.flatten(0, 1), reference.flatten(0, 1), data_range=1.0)
    assert metrics.ssim(other, reference) == pytest.approx(float(at_once), abs=1e-6)


def test_latents_are_measured_on_the_references_range():
    reference = Media(10 * clip() - 5, "latents")
    pixels = Media(clip(), "pixels")
    judge = Judge()
    found = judge(Media(10 * noise(clip(), 0.3) - 5, "latents"), reference)
    plain = judge(Media(noise(clip(), 0.3), "pixels"), pixels)
    spread = float(clip().max() - clip().min())
    assert found.psnr == pytest.approx(plain.psnr + 20 * math.log10(spread), abs=1e-3)


def test_too_small_frames_have_no_ssim_and_a_reason():
    tiny = Media(torch.rand(1, 1, 3, 5, 9), "pixels")
    judge = Judge()
    assert judge(tiny, tiny).ssim is None
    assert any("5×9" in reason for reason in judge.reasons)


def test_packed_latents_of_unknown_layout_have_psnr_alone():
    rows = Media(torch.randn(1, 1, 1, 20, 20), "rows")
    found = Judge()(Media(rows.values + 0.1, "rows"), rows)
    assert math.isfinite(found.psnr)
    assert (found.ssim, found.sharpness, found.lpips) == (None, None, None)


def test_without_torchmetrics_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(metrics, "find_spec", lambda name: None)
    judge = Judge()
    media = Media(clip(), "pixels")
    assert judge(media, media).ssim is None
    assert "sgl-diffusion-accel[compare]" in next(iter(judge.reasons))


def test_lpips_says_why_it_is_missing():
    lpips = Lpips()
    assert "64 pixels" in lpips.why_not(Media(torch.rand(1, 1, 3, 32, 32), "pixels"))
    assert "RGB" in lpips.why_not(Media(torch.rand(1, 1, 3, 128, 128), "latents"))
    assert "RGB" in lpips.why_not(Media(torch.rand(1, 1, 1, 128, 128), "pixels"))


def test_lpips_names_what_is_not_installed_and_downloads_nothing(monkeypatch, tmp_path):
    lpips, large = Lpips(), Media(torch.rand(1, 1, 3, 64, 64), "pixels")
    monkeypatch.setattr(perceptual, "find_spec", lambda name: None if name == "torchvision" else name)
    assert "pip install torchvision" in lpips.why_not(large)
    monkeypatch.setattr(perceptual, "find_spec", lambda name: name)
    monkeypatch.setattr(perceptual, "weights_path", lambda: tmp_path / "alexnet.pth")
    assert str(tmp_path / "alexnet.pth") in lpips.why_not(large)
    (tmp_path / "alexnet.pth").touch()
    assert lpips.why_not(large) is None
    monkeypatch.setattr(perceptual, "weights_path", lambda: 1 // 0)
    assert "ZeroDivisionError" in lpips.why_not(large)


def test_lpips_ranks_growing_damage_where_it_can_be_had():
    lpips, reference = Lpips(), Media(clip(side=64), "pixels")
    reason = lpips.why_not(reference)
    if reason:
        pytest.skip(reason)
    found = [lpips(noise(reference.values, strength), reference.values) for strength in (0.0, *STRENGTHS)]
    assert found[0] == pytest.approx(0, abs=1e-6)
    assert falls([-value for value in found])


def test_other_shapes_are_refused():
    with pytest.raises(ConfigError, match="cannot be compared"):
        Judge()(Media(clip(frames=5), "pixels"), Media(clip(frames=6), "pixels"))


@pytest.mark.parametrize(
    ("share", "expected"),
    [(0.3, 35.0), (0.2, 30.0), (0.4, 40.0), (0.195, 30.0), (0.41, 40.0), (0.5, None)],
)
def test_fewer_steps_are_interpolated_and_never_extrapolated_beyond_rounding(share, expected):
    found = metrics.psnr_at([(0.2, 30.0), (0.4, 40.0)], share, near=0.015)
    assert found == (None if expected is None else pytest.approx(expected))

"""Pictures, clips and latents are found in whatever a pipeline returns."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.flux.pipeline_output import FluxPipelineOutput
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
from PIL import Image

from invariants.families import families, present
from sgl_diffusion_accel import ConfigTypeError
from sgl_diffusion_accel.comparing.measures.read_output import read_output

RNG = np.random.default_rng(0)


def pil(mode="RGB", size=(6, 4)):
    channels = {"L": (), "RGB": (3,), "RGBA": (4,), "P": ()}[mode]
    return Image.fromarray(RNG.integers(0, 255, (size[1], size[0], *channels), dtype=np.uint8), mode=None).convert(mode)


def test_pil_pictures_stay_uint8_and_have_the_range_of_a_unit():
    pictures = [pil(), pil()]
    media = read_output(FluxPipelineOutput(images=pictures))
    assert media.values.shape == (2, 1, 3, 4, 6)
    assert media.values.dtype == torch.uint8
    assert torch.equal(media.values[1, 0], torch.from_numpy(np.array(pictures[1])).permute(2, 0, 1))
    assert (media.kind, media.peak, media.is_clip) == ("pixels", 1.0, False)


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3), ("RGBA", 4), ("P", 3)])
def test_pil_pictures_of_every_mode(mode, channels):
    assert read_output(([pil(mode)],)).values.shape == (1, 1, channels, 4, 6)


def test_arrays_have_their_channels_last_and_tensors_before_height():
    array = RNG.random((2, 4, 6, 3), dtype=np.float32)
    from_array = read_output(FluxPipelineOutput(images=array))
    from_tensor = read_output((torch.from_numpy(array).permute(0, 3, 1, 2),))
    assert torch.equal(from_array.values, from_tensor.values)
    assert from_array.values.shape == (2, 1, 3, 4, 6)
    assert from_array.kind == "pixels"


def test_clips_as_array_tensor_and_nested_lists_are_the_same():
    array = RNG.integers(0, 255, (2, 5, 4, 6, 3), dtype=np.uint8)
    nested = [[Image.fromarray(frame) for frame in clip] for clip in array]
    media = [
        read_output(WanPipelineOutput(frames=array)),
        read_output((torch.from_numpy(array).permute(0, 1, 4, 2, 3),)),
        read_output(WanPipelineOutput(frames=nested)),
        read_output((nested,)),
        read_output(([list(clip) for clip in array],)),
    ]
    for one in media:
        assert one.is_clip
        assert torch.equal(one.values, media[0].values)
    assert media[0].values.shape == (2, 5, 3, 4, 6)


def test_a_flat_list_is_pictures_but_one_clip_under_the_name_of_frames():
    frames = [pil(), pil(), pil()]
    assert read_output(FluxPipelineOutput(images=frames)).values.shape[:2] == (3, 1)
    assert read_output(WanPipelineOutput(frames=frames)).values.shape[:2] == (1, 3)


def test_channels_before_the_frames_are_found():
    assert read_output((torch.rand(1, 3, 5, 8, 8),)).values.shape == (1, 5, 3, 8, 8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_floats_of_every_width_are_measured_with_32_bits_or_more(dtype):
    assert read_output((torch.rand(1, 3, 8, 8).to(dtype),)).values.dtype in (torch.float32, torch.float64)


def test_what_leaves_the_unit_is_measured_on_its_own_range():
    media = read_output((torch.linspace(-1, 1, 192).reshape(1, 3, 8, 8),))
    assert (media.kind, media.peak) == ("latents", 2.0)


def test_the_output_is_copied():
    tensor = torch.rand(1, 3, 8, 8)
    media = read_output((tensor,))
    before = media.values.clone()
    tensor.zero_()
    assert torch.equal(media.values, before)


SHAPES = {
    "wan": (1, 2, 4, 8, 8),
    "wan22": (1, 2, 4, 8, 8),
    "hunyuan": (1, 2, 4, 8, 8),
    "cogvideox": (1, 2, 4, 8, 8),  # which has its frames before its channels
    "qwen": (1, 1, 4, 8, 8),
    "flux": (1, 1, 4, 8, 8),
    "zimage": (1, 1, 4, 8, 8),
    "flux2": (1, 1, 16, 4, 4),  # by the picture's proportions
    "ltx": (1, 2, 8, 4, 4),
}


@families(*SHAPES)
@pytest.mark.parametrize("as_tuple", [True, False])
def test_latents_of_every_layout_are_put_in_space(family, as_tuple):
    pipe = family.make()
    call = family.call(pipe, steps=1)
    with torch.no_grad():
        media = read_output(pipe(**call, return_dict=not as_tuple), pipe, call)
    assert media.kind == "latents"
    assert tuple(media.values.shape) == SHAPES[family.name]


def test_packed_latents_are_unpacked_as_the_pipeline_does_it():
    family = present("flux")
    pipe = family.make()
    latents = torch.randn(1, 3, 8, 12)
    packed = diffusers.FluxPipeline._pack_latents(latents, 1, 3, 8, 12)
    media = read_output((packed,), pipe, {"height": 64, "width": 96, "output_type": "latent"})
    assert torch.equal(media.values[:, 0], latents)


def test_packed_latents_of_unknown_layout_keep_their_values():
    media = read_output((torch.randn(1, 7, 5),), None, {"output_type": "latent"})
    assert media.kind == "rows"
    assert media.values.shape == (1, 1, 1, 7, 5)


def test_the_users_decoder_decides():
    media = read_output("anything", decode=lambda output: torch.full((1, 3, 8, 8), len(output) / 10))
    assert media.kind == "pixels"
    assert torch.all(media.values == 0.8)


@pytest.mark.parametrize(
    "output",
    [None, "text", ([],), (torch.rand(1, 5, 8, 8),), ([pil(), pil(size=(4, 4))],), {}, (torch.rand(1, 3, 0, 8),)],
)
def test_an_output_without_pictures_is_refused_with_the_way_out(output):
    with pytest.raises(ConfigTypeError, match="Give decode="):
        read_output(output)

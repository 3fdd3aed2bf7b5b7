"""Qwen-Image: editing, layers, inpainting, ControlNet; and Qwen-Image 2.1."""

from __future__ import annotations

from typing import Any

from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from pipelines.base import Case, left_half, made, model, photo, picture, pipeline, words
from pipelines.vaes import wan_vae
from zoo.base import flow_euler
from zoo.qwen import CHANNELS, TEXT

QWEN = "QwenImageTransformer2DModel"
PICTURE, MASK = picture(), left_half()
PHOTO = photo()


def qwen(
    name: str, call: dict[str, Any], label: str = "", control: int = 0, edits: bool = False, **changes: Any
) -> Case:
    """A class that runs Qwen-Image; `control` is the number of channels more that its ControlNet takes."""

    def make() -> Any:
        transformer = model(QWEN, in_channels=CHANNELS, out_channels=CHANNELS // 4, joint_attention_dim=TEXT, **changes)
        parts = {}
        if control:
            config = {k: v for k, v in transformer.config.items() if not k.startswith("_") and k in _OF_CONTROLNET}
            parts["controlnet"] = made("QwenImageControlNetModel", **{**config, "num_layers": 1}, **_more(control))
        vae = wan_vae(CHANNELS // 4, "AutoencoderKLQwenImage")
        pipe = pipeline(name, vae=vae, transformer=transformer, scheduler=flow_euler(True), **parts)
        if name == "QwenImageLayeredPipeline":
            pipe.text_encoder = vae  # it is asked for its dtype alone
        return shrinking(pipe) if edits else pipe

    given = {**words(TEXT, mask="prompt_embeds_mask"), "true_cfg_scale": 4.0, "guidance_scale": None}
    return Case(name, make, lambda: {**given, **call}, label)


class Small(VaeImageProcessor):
    """Makes every picture one of 64 × 64: these pipelines ask for a million pixels."""

    def resize(self, image: Any, *_: Any, **__: Any) -> Any:
        return super().resize(image, 64, 64)

    def preprocess(self, image: Any, *_: Any, **__: Any) -> Any:
        return super().preprocess(image, 64, 64)

    def postprocess(self, image: Any, *_: Any, **__: Any) -> Any:
        return image


def shrinking(pipe: Any) -> Any:
    """A pipeline for which 1024 pixels are 8 latents."""
    pipe.image_processor = Small(vae_scale_factor=16)
    if hasattr(pipe, "mask_processor"):
        pipe.mask_processor = Small(**{k: v for k, v in pipe.mask_processor.config.items() if not k.startswith("_")})
    pipe.vae_scale_factor = 128
    return pipe


_OF_CONTROLNET = (
    "patch_size",
    "in_channels",
    "out_channels",
    "attention_head_dim",
    "num_attention_heads",
    "joint_attention_dim",
    "axes_dims_rope",
)


def _more(control: int) -> dict[str, Any]:
    return {"extra_condition_channels": control - 1} if control > 1 else {}


LARGE = {"height": 1024, "width": 1024}
WINDOW = {"control_guidance_start": 0.3, "control_guidance_end": 0.7}

CASES = (
    qwen("QwenImageImg2ImgPipeline", {"image": PICTURE, "strength": 0.8}),
    qwen("QwenImageInpaintPipeline", {"image": PICTURE, "mask_image": MASK, "strength": 0.8}),
    qwen("QwenImageEditPipeline", {"image": PHOTO, **LARGE}, edits=True),
    qwen(
        "QwenImageEditInpaintPipeline",
        {"image": PHOTO, "mask_image": Image.new("L", (64, 64), 255), "strength": 0.8, **LARGE},
        edits=True,
    ),
    qwen("QwenImageEditPlusPipeline", {"image": [PHOTO, PHOTO], **LARGE}, edits=True),
    qwen(
        "QwenImageLayeredPipeline",
        {"image": PHOTO, "layers": 2, "prompt": "a cat", "resolution": 1024, "output_type": "pt"},
        edits=True,
        use_additional_t_cond=True,
        use_layer3d_rope=True,
    ),
    qwen("QwenImageControlNetPipeline", {"control_image": PICTURE, **WINDOW}, control=1),
    qwen("QwenImageControlNetInpaintPipeline", {"control_image": PICTURE, "control_mask": MASK, **WINDOW}, control=5),
)

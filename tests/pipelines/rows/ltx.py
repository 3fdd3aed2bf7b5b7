"""LTX-Video and LTX-2: image to video, conditions, long videos, sound; three further branches."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from zoo.base import flow_euler
from zoo.ltx import CHANNELS, TEXT

from ..base import Case, made, model, photo, picture, pipeline, values, words
from ..vaes import ltx_vae

LTX, LTX2 = "LTXVideoTransformer3DModel", "LTX2VideoTransformer3DModel"
PHOTO = photo()


def ltx(name: str, call: dict[str, Any], label: str = "", scheduler: Any = flow_euler) -> Case:
    def make() -> Any:
        transformer = model(LTX)
        vae = ltx_vae(transformer.config.in_channels)
        pipe = pipeline(name, vae=vae, transformer=transformer, scheduler=scheduler())
        return pipe

    def given() -> dict[str, Any]:
        return {**words(16, mask="prompt_attention_mask"), "num_frames": 9, **call}

    return Case(name, make, given, label)



CASES = (
    ltx("LTXImageToVideoPipeline", {"image": PHOTO}, scheduler=lambda: flow_euler(True)),
    ltx("LTXConditionPipeline", {"image": PHOTO}),
    ltx("LTXConditionPipeline", {"video": [PHOTO] * 9, "denoise_strength": 0.6}, "a video, strength 0.6"),
)

"""LTX-Video and LTX-2: image to video, conditions, long videos, sound; three further branches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pipelines.base import Case, model, photo, pipeline, values, words
from pipelines.vaes import ltx2_audio_vae, ltx2_vae, ltx_vae
from zoo.base import flow_euler

LTX, LTX2 = "LTXVideoTransformer3DModel", "LTX2VideoTransformer3DModel"
PHOTO = photo()


def ltx(name: str, call: dict[str, Any], label: str = "", scheduler: Any = lambda: flow_euler(shift=1.0)) -> Case:
    def make() -> Any:
        transformer = model(LTX)
        vae = ltx_vae(transformer.config.in_channels)
        return pipeline(name, vae=vae, transformer=transformer, scheduler=scheduler())

    def given() -> dict[str, Any]:
        return {**words(16, mask="prompt_attention_mask"), "num_frames": 9, **call}

    return Case(name, make, given, label)


def ltx2(name: str, call: dict[str, Any], label: str = "") -> Case:
    """With sound."""

    def make() -> Any:
        parts = {"transformer": model(LTX2, perturbed_attn=True), "scheduler": flow_euler(True)}
        pipe = pipeline(name, vae=ltx2_vae(4), audio_vae=ltx2_audio_vae(), **parts)
        pipe.connectors = lambda prompt, mask, **_: (prompt, -prompt, mask)
        return pipe

    given = {**words(16, mask="prompt_attention_mask"), "num_frames": 9, "frame_rate": 24.0, "stg_scale": 0.0}
    return Case(name, make, lambda: {**given, **call}, label, (LTX2,))


LONG = {
    "prompt": "a cat | a dog",
    "negative_prompt": "a bird",
    "num_frames": 33,
    "temporal_tile_size": 24,
    "temporal_overlap": 8,
    "seed": 0,
}


def _long() -> Any:
    pipe = pipeline("LTXI2VLongMultiPromptPipeline", vae=ltx_vae(4), transformer=model(LTX), scheduler=flow_euler())
    pipe.encode_prompt = lambda prompt=None, **_: (*_encoded(str(prompt)), *_encoded("negative"))
    return pipe


def _encoded(prompt: str) -> tuple[Tensor, Tensor]:
    return values(1, 7, 16, key=prompt), torch.ones(1, 7, dtype=torch.long)


THREE = {"stg_scale": 1.0, "modality_scale": 3.0, "spatio_temporal_guidance_blocks": [1]}
CASES = (
    ltx("LTXImageToVideoPipeline", {"image": PHOTO}, scheduler=lambda: flow_euler(True)),
    ltx("LTXConditionPipeline", {"image": PHOTO}),
    ltx("LTXConditionPipeline", {"video": [PHOTO] * 9, "denoise_strength": 0.6}, "a video, strength 0.6"),
    ltx2("LTX2Pipeline", {"modality_scale": 1.0, "audio_stg_scale": 0.0, "audio_modality_scale": 1.0}),
    ltx2("LTX2Pipeline", THREE, "three kinds of guidance"),
    ltx2("LTX2ConditionPipeline", THREE),
    ltx2("LTX2InContextPipeline", THREE),
    Case("LTXI2VLongMultiPromptPipeline", _long, lambda: LONG, "two windows"),
)

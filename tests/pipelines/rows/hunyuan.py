"""HunyuanVideo, its image to video and framepack; HunyuanVideo 1.5; HunyuanImage; HunyuanDiT."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.guiders import ClassifierFreeGuidance
from PIL import Image

from zoo.base import flow_euler
from zoo.hunyuan import CHANNELS, POOLED, TEXT

from ..base import Case, made, model, pipeline, values, words
from ..vaes import hunyuan_vae

PHOTO = Image.new("RGB", (64, 64), (200, 90, 30))
VIDEO, FRAMEPACK = "HunyuanVideoTransformer3DModel", "HunyuanVideoFramepackTransformer3DModel"
IMAGE, DIT = "HunyuanImageTransformer2DModel", "HunyuanDiT2DModel"


def video(name: str, call: dict[str, Any], kind: str = VIDEO, label: str = "", negative: bool = True, **changes: Any) -> Case:
    def make() -> Any:
        transformer = model(kind, **changes)
        width = transformer.config.text_embed_dim
        pipe = pipeline(name, vae=hunyuan_vae(CHANNELS), transformer=transformer, scheduler=flow_euler())
        prompt = (values(1, 7, width, key="p"), values(1, transformer.config.pooled_projection_dim, key="q"))
        pipe.encode_prompt = lambda prompt_embeds=None, **_: (*prompt, torch.ones(1, 7, dtype=torch.long))
        pipe.encode_image = lambda *_, **__: values(1, 3, transformer.config.get("image_proj_dim") or 8, key="image")
        return pipe

    return Case(name, make, lambda: {"prompt": "a cat", "num_frames": 5, "image": PHOTO, **call}, label, (kind,))


def image(name: str, call: dict[str, Any], label: str = "", **changes: Any) -> Case:
    def make() -> Any:
        guider = ClassifierFreeGuidance(guidance_scale=4.0)
        return pipeline(name, transformer=model(IMAGE, **changes), scheduler=flow_euler(), guider=guider)

    return Case(name, make, lambda: call, label, (IMAGE,))


CASES = ()

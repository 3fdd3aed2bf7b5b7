"""LongCat-Image and Ovis-Image: wired as FLUX, with CFG by two calls."""

from __future__ import annotations

from typing import Any

import torch

from .base import Family, assemble, build, flow_euler, missing, normal

CHANNELS, TEXT = 16, 24
CONFIG = {
    "patch_size": 1,
    "in_channels": CHANNELS,
    "num_layers": 4,
    "num_single_layers": 6,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": TEXT,
    "axes_dims_rope": (4, 6, 6),
}


def _parts(scheduler: Any) -> dict[str, Any]:
    return {"scheduler": scheduler or flow_euler(dynamic=True), "vae": None, "text_encoder": None, "tokenizer": None}


def embed(prompts: list[str]) -> torch.Tensor:
    """In place of a text encoder: one seeded embedding for each prompt."""
    return torch.stack([normal(7, TEXT, seed=0, key=prompt) for prompt in prompts])


def make_longcat(seed: int = 0, scheduler: Any = None, **config: Any) -> Any:
    model = build("LongCatImageTransformer2DModel", seed, **{**CONFIG, "pooled_projection_dim": TEXT, **config})
    pipe = assemble("LongCatImagePipeline", text_processor=None, transformer=model, **_parts(scheduler))
    pipe._encode_prompt = embed  # it takes no embeddings without a prompt
    return pipe


def make_ovis(seed: int = 0, scheduler: Any = None, **config: Any) -> Any:
    model = build("OvisImageTransformer2DModel", seed, **{**CONFIG, "out_channels": CHANNELS, **config})
    return assemble("OvisImagePipeline", transformer=model, **_parts(scheduler))


def call(
    pipe: Any,
    steps: int = 6,
    seed: int = 0,
    batch: int = 1,
    size: tuple[int, ...] | None = None,
    guidance: float | None = None,
    **more: Any,
) -> dict[str, Any]:
    height, width = size or (64, 64)
    scale = 4.0 if guidance is None else guidance
    kwargs = {
        "prompt_embeds": normal(batch, 7, TEXT, seed=seed, key="prompt"),
        "negative_prompt": None,
        "latents": normal(batch, height * width // 256, CHANNELS, seed=seed, key="latents"),
        "height": height,
        "width": width,
        "num_inference_steps": steps,
        "guidance_scale": scale,
        "output_type": "latent",
    }
    if scale > 1:
        kwargs["negative_prompt_embeds"] = normal(batch, 7, TEXT, seed=seed, key="negative")
    return {**kwargs, **more}


def call_longcat(pipe: Any, steps: int = 6, seed: int = 0, batch: int = 1, **more: Any) -> dict[str, Any]:
    kwargs = call(pipe, steps, seed, batch, **more)
    del kwargs["prompt_embeds"]
    if kwargs.pop("negative_prompt_embeds", None) is not None:
        kwargs["negative_prompt"] = [f"negative {seed} {i}" for i in range(batch)]
    kwargs["prompt"] = [f"prompt {seed} {i}" for i in range(batch)]
    return {**kwargs, "enable_prompt_rewrite": False}


_LISTS = ("transformer_blocks", "single_transformer_blocks")
_CFG = ("cond", "uncond")
FAMILIES = (
    Family(
        "longcat",
        make_longcat,
        call_longcat,
        _CFG,
        _LISTS,
        other_guidance=(1.0, ("cond",)),
        contexts=_CFG,
        missing=missing("LongCatImagePipeline"),
    ),
    Family(
        "ovis",
        make_ovis,
        call,
        _CFG,
        _LISTS,
        other_guidance=(1.0, ("cond",)),
        contexts=_CFG,
        missing=missing("OvisImagePipeline"),
    ),
)

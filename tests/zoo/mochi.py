"""Mochi: batched CFG, and a last block that leaves the text alone."""

from __future__ import annotations

from typing import Any

import torch

from .base import Family, assemble, build, flow_euler, missing, normal

CHANNELS, TEXT = 4, 24


def make(seed: int = 0, scheduler: Any = None, **config: Any) -> Any:
    defaults = {
        "patch_size": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 6,
        "pooled_projection_dim": 16,
        "in_channels": CHANNELS,
        "text_embed_dim": TEXT,
        "time_embed_dim": 16,
        "max_sequence_length": 8,
    }
    return assemble(
        "MochiPipeline",
        scheduler=scheduler or flow_euler(shift=1.0),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        transformer=build("MochiTransformer3DModel", seed, **{**defaults, **config}),
    )


def call(
    pipe: Any,
    steps: int = 6,
    seed: int = 0,
    batch: int = 1,
    size: tuple[int, ...] | None = None,
    guidance: float | None = None,
    **more: Any,
) -> dict[str, Any]:
    height, width, frames = size or (64, 64, 7)
    scale = 4.0 if guidance is None else guidance
    shape = (batch, CHANNELS, (frames - 1) // 6 + 1, height // 8, width // 8)
    kwargs = {
        "prompt_embeds": normal(batch, 8, TEXT, seed=seed, key="prompt"),
        "prompt_attention_mask": (torch.arange(8) < 7).expand(batch, 8),
        "latents": normal(*shape, seed=seed, key="latents"),
        "height": height,
        "width": width,
        "num_frames": frames,
        "num_inference_steps": steps,
        "guidance_scale": scale,
        "output_type": "latent",
    }
    if scale > 1:
        kwargs["negative_prompt_embeds"] = normal(batch, 8, TEXT, seed=seed, key="negative")
        kwargs["negative_prompt_attention_mask"] = (torch.arange(8) < 5).expand(batch, 8)
    return {**kwargs, **more}


FAMILIES = (
    Family(
        "mochi",
        make,
        call,
        ("cond_uncond",),
        ("transformer_blocks",),
        (64, 96, 13),
        (1.0, ("cond",)),
        ("cond_uncond",),
        missing=missing("MochiPipeline"),
    ),
)

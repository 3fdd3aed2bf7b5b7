"""Kandinsky 5: own argument names, two calls a step without a cache context; the loop writes into the latents."""

from __future__ import annotations

from typing import Any

import torch

from .base import Family, assemble, build, flow_euler, missing, normal

CHANNELS, TEXT, POOLED = 4, 24, 20


def make(seed: int = 0, scheduler: Any = None, **config: Any) -> Any:
    defaults = {
        "in_visual_dim": CHANNELS,
        "in_text_dim": TEXT,
        "in_text_dim2": POOLED,
        "time_dim": 16,
        "out_visual_dim": CHANNELS,
        "model_dim": 32,
        "ff_dim": 64,
        "num_text_blocks": 1,
        "num_visual_blocks": 6,
        "axes_dims": (4, 6, 6),
    }
    return assemble(
        "Kandinsky5T2VPipeline",
        transformer=build("Kandinsky5Transformer3DModel", seed, **{**defaults, **config}),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        scheduler=scheduler or flow_euler(),
    )


def _prompt(seed: int, batch: int, prefix: str) -> dict[str, Any]:
    return {
        f"{prefix}prompt_embeds_qwen": normal(batch, 7, TEXT, seed=seed, key=f"{prefix}prompt"),
        f"{prefix}prompt_embeds_clip": normal(batch, POOLED, seed=seed, key=f"{prefix}pooled"),
        f"{prefix}prompt_cu_seqlens": torch.arange(batch + 1, dtype=torch.int32) * 7,
    }


def call(
    pipe: Any,
    steps: int = 6,
    seed: int = 0,
    batch: int = 1,
    size: tuple[int, ...] | None = None,
    guidance: float | None = None,
    **more: Any,
) -> dict[str, Any]:
    height, width, frames = size or (64, 64, 5)
    scale = 4.0 if guidance is None else guidance
    shape = (batch, (frames - 1) // 4 + 1, height // 8, width // 8, CHANNELS)
    return {
        **_prompt(seed, batch, ""),
        **(_prompt(seed, batch, "negative_") if scale > 1 else {}),
        "latents": normal(*shape, seed=seed, key="latents"),
        "height": height,
        "width": width,
        "num_frames": frames,
        "num_inference_steps": steps,
        "guidance_scale": scale,
        "output_type": "latent",
        **more,
    }


FAMILIES = (
    Family(
        "kandinsky5",
        make,
        call,
        ("cond", "uncond"),
        ("visual_transformer_blocks",),
        (64, 96, 9),
        (1.0, ("cond",)),
        missing=missing("Kandinsky5T2VPipeline"),
    ),
)

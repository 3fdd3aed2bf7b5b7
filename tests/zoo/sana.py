"""Sana: linear attention, batched CFG, a multistep scheduler, no cache context."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from .base import Family, assemble, build, missing, normal

CHANNELS, TEXT = 8, 24


def make(seed: int = 0, scheduler: Any = None, **config: Any) -> Any:
    defaults = {
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 6,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 16,
        "cross_attention_dim": 32,
        "caption_channels": TEXT,
        "sample_size": 32,
    }
    return assemble(
        "SanaPipeline",
        tokenizer=None,
        text_encoder=None,
        vae=None,
        transformer=build("SanaTransformer2DModel", seed, **{**defaults, **config}),
        scheduler=scheduler
        or diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
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
    height, width = size or (128, 128)
    scale = 4.0 if guidance is None else guidance
    kwargs = {
        "prompt_embeds": normal(batch, 7, TEXT, seed=seed, key="prompt"),
        "prompt_attention_mask": torch.ones(batch, 7, dtype=torch.long),
        "negative_prompt": None,
        "latents": normal(batch, CHANNELS, height // 32, width // 32, seed=seed, key="latents"),
        "height": height,
        "width": width,
        "num_inference_steps": steps,
        "guidance_scale": scale,
        "use_resolution_binning": False,
        "output_type": "latent",
    }
    if scale > 1:
        kwargs["negative_prompt_embeds"] = normal(batch, 7, TEXT, seed=seed, key="negative")
        kwargs["negative_prompt_attention_mask"] = (torch.arange(7) < 5).long().expand(batch, 7)
    return {**kwargs, **more}


FAMILIES = (
    Family(
        "sana",
        make,
        call,
        ("cond_uncond",),
        ("transformer_blocks",),
        (128, 160),
        (1.0, ("cond",)),
        missing=missing("SanaPipeline"),
    ),
)

"""Lumina 2: two calls a step without a cache context; the pipeline never looks at its interrupt flag."""

from __future__ import annotations

from typing import Any

import torch

from .base import Family, assemble, build, flow_euler, missing, normal

CHANNELS, TEXT = 4, 24


def make(seed: int = 0, scheduler: Any = None, **config: Any) -> Any:
    defaults = {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": CHANNELS,
        "hidden_size": 32,
        "num_layers": 6,
        "num_refiner_layers": 1,
        "num_attention_heads": 2,
        "num_kv_heads": 1,
        "multiple_of": 16,
        "axes_dim_rope": (4, 6, 6),
        "axes_lens": (64, 32, 32),
        "cap_feat_dim": TEXT,
    }
    return assemble(
        "Lumina2Pipeline",
        transformer=build("Lumina2Transformer2DModel", seed, **{**defaults, **config}),
        scheduler=scheduler or flow_euler(),
        vae=None,
        text_encoder=None,
        tokenizer=None,
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
    """`cfg_trunc_ratio=0.5` turns CFG off in the middle of the run."""
    height, width = size or (64, 64)
    scale = 4.0 if guidance is None else guidance
    kwargs = {
        "prompt_embeds": normal(batch, 7, TEXT, seed=seed, key="prompt"),
        "prompt_attention_mask": torch.ones(batch, 7, dtype=torch.long),
        "latents": normal(batch, CHANNELS, height // 8, width // 8, seed=seed, key="latents"),
        "height": height,
        "width": width,
        "num_inference_steps": steps,
        "guidance_scale": scale,
        "output_type": "latent",
    }
    if scale > 1:
        kwargs["negative_prompt_embeds"] = normal(batch, 7, TEXT, seed=seed, key="negative")
        kwargs["negative_prompt_attention_mask"] = (torch.arange(7) < 5).long().expand(batch, 7)
    return {**kwargs, **more}


FAMILIES = (
    Family(
        "lumina2",
        make,
        call,
        ("cond", "uncond"),
        ("layers",),
        other_guidance=(1.0, ("cond",)),
        missing=missing("Lumina2Pipeline"),
    ),
)

"""FLUX.2: text and image are concatenated between the lists; one call a step, guidance embedded."""

from __future__ import annotations

from typing import Any

from .base import Family, assemble, build, flow_euler, missing, normal

CHANNELS, TEXT = 16, 24


def make(seed: int = 0, scheduler: Any = None, **config: Any) -> Any:
    defaults = {
        "patch_size": 1,
        "in_channels": CHANNELS,
        "num_layers": 4,
        "num_single_layers": 6,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": TEXT,
        "timestep_guidance_channels": 32,
        "axes_dims_rope": (4, 4, 4, 4),
    }
    return assemble(
        "Flux2Pipeline",
        scheduler=scheduler or flow_euler(dynamic=True),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        transformer=build("Flux2Transformer2DModel", seed, **{**defaults, **config}),
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
    height, width = size or (64, 64)
    return {
        "prompt_embeds": normal(batch, 7, TEXT, seed=seed, key="prompt"),
        "latents": normal(batch, CHANNELS, height // 16, width // 16, seed=seed, key="latents"),
        "height": height,
        "width": width,
        "num_inference_steps": steps,
        "guidance_scale": 4.0 if guidance is None else guidance,
        "output_type": "latent",
        **more,
    }


FAMILIES = (
    Family(
        "flux2",
        make,
        call,
        ("cond",),
        ("transformer_blocks", "single_transformer_blocks"),
        missing=missing("Flux2Pipeline"),
    ),
)

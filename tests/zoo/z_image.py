"""Z-Image: lists of tensors, positional arguments, no cache context, batched CFG; the two prompts differ in length."""

from __future__ import annotations

from typing import Any

from .base import Family, assemble, build, flow_euler, missing, normal

CHANNELS, TEXT = 4, 24


def make(seed: int = 0, scheduler: Any = None, **config: Any) -> Any:
    defaults = {
        "in_channels": CHANNELS,
        "dim": 32,
        "n_layers": 6,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": TEXT,
        "axes_dims": [4, 6, 6],
        "axes_lens": [128, 32, 32],
    }
    return assemble(
        "ZImagePipeline",
        scheduler=scheduler or flow_euler(),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        transformer=build("ZImageTransformer2DModel", seed, **{**defaults, **config}),
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
    """`guidance=0` turns CFG off; `cfg_truncation=0.5` turns it off in the middle of the run."""
    height, width = size or (64, 64)
    scale = 3.0 if guidance is None else guidance
    kwargs = {
        "prompt_embeds": [normal(7, TEXT, seed=seed, key=f"prompt {i}") for i in range(batch)],
        "latents": normal(batch, CHANNELS, height // 8, width // 8, seed=seed, key="latents"),
        "height": height,
        "width": width,
        "num_inference_steps": steps,
        "guidance_scale": scale,
        "output_type": "latent",
    }
    if scale > 0:
        kwargs["negative_prompt_embeds"] = [normal(5, TEXT, seed=seed, key=f"negative {i}") for i in range(batch)]
    return {**kwargs, **more}


FAMILIES = (
    Family(
        "zimage",
        make,
        call,
        ("cond_uncond",),
        ("layers",),
        other_guidance=(0.0, ("cond",)),
        missing=missing("ZImagePipeline"),
    ),
)

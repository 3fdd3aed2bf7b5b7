"""FLUX: text to image, image to image, and with ControlNet residuals."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import torch

from .base import Family, assemble, build, flow_euler, missing, normal, tiny_vae

CHANNELS, TEXT, POOLED = 16, 24, 20
CONFIG = {
    "patch_size": 1,
    "in_channels": CHANNELS,
    "num_layers": 4,
    "num_single_layers": 6,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": TEXT,
    "pooled_projection_dim": POOLED,
    "guidance_embeds": True,
    "axes_dims_rope": (4, 6, 6),
}


def _parts(seed: int, scheduler: Any, config: dict[str, Any]) -> dict[str, Any]:
    return {
        "scheduler": scheduler or flow_euler(dynamic=True),
        "text_encoder": None,
        "tokenizer": None,
        "text_encoder_2": None,
        "tokenizer_2": None,
        "transformer": build("FluxTransformer2DModel", seed, **{**CONFIG, **config}),
    }


def make(seed: int = 0, scheduler: Any = None, **config: Any) -> Any:
    return assemble("FluxPipeline", vae=None, **_parts(seed, scheduler, config))


def make_img2img(seed: int = 0, scheduler: Any = None, **config: Any) -> Any:
    return assemble("FluxImg2ImgPipeline", vae=tiny_vae(CHANNELS // 4, seed), **_parts(seed, scheduler, config))


def make_controlnet(
    seed: int = 0, scheduler: Any = None, controlnet: dict[str, Any] | None = None, **config: Any
) -> Any:
    """The ControlNet has half as many blocks as the transformer, so that each residual serves two blocks."""
    control = {**CONFIG, "num_layers": 2, "num_single_layers": 3, **(controlnet or {})}
    return assemble(
        "FluxControlNetPipeline",
        vae=tiny_vae(CHANNELS // 4, seed),
        controlnet=build("FluxControlNetModel", seed + 1000, **control),
        **_parts(seed, scheduler, config),
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
    """`guidance` above 1 turns true CFG on; the embedded guidance stays."""
    height, width = size or (64, 64)
    kwargs = {
        "prompt_embeds": normal(batch, 7, TEXT, seed=seed, key="prompt"),
        "pooled_prompt_embeds": normal(batch, POOLED, seed=seed, key="pooled"),
        "latents": normal(batch, height * width // 256, CHANNELS, seed=seed, key="latents"),
        "height": height,
        "width": width,
        "num_inference_steps": steps,
        "guidance_scale": 3.5,
        "output_type": "latent",
    }
    if guidance is not None and guidance > 1:
        kwargs["true_cfg_scale"] = guidance
        kwargs["negative_prompt_embeds"] = normal(batch, 7, TEXT, seed=seed, key="negative")
        kwargs["negative_pooled_prompt_embeds"] = normal(batch, POOLED, seed=seed, key="negative pooled")
    return {**kwargs, **more}


def _picture(batch: int, height: int, width: int, seed: int) -> torch.Tensor:
    return normal(batch, 3, height, width, seed=seed, key="picture").sigmoid()


def call_img2img(
    pipe: Any, steps: int = 6, seed: int = 0, batch: int = 1, strength: float = 1.0, **more: Any
) -> dict[str, Any]:
    """`strength` below 1 drops the first steps of the schedule."""
    kwargs = call(pipe, steps, seed, batch, **more)
    del kwargs["latents"]
    kwargs["image"] = _picture(batch, kwargs["height"], kwargs["width"], seed)
    kwargs.setdefault("generator", torch.Generator().manual_seed(seed))
    return {**kwargs, "strength": strength}


def call_controlnet(pipe: Any, steps: int = 6, seed: int = 0, batch: int = 1, **more: Any) -> dict[str, Any]:
    kwargs = call(pipe, steps, seed, batch, **more)
    kwargs["control_image"] = _picture(batch, kwargs["height"], kwargs["width"], seed)
    kwargs.setdefault("generator", torch.Generator().manual_seed(seed))
    return kwargs


_LISTS = ("transformer_blocks", "single_transformer_blocks")


def _true_cfg(pipeline: str) -> tuple[float, tuple[str, ...]] | None:
    """Older FLUX pipelines turn true CFG on for a negative prompt in words alone, never for its embeddings."""
    source = inspect.getsource(getattr(diffusers, pipeline).__call__) if hasattr(diffusers, pipeline) else ""
    return (3.0, ("cond", "uncond")) if "has_neg_prompt" in source else None


FAMILIES = (
    Family(
        "flux",
        make,
        call,
        ("cond",),
        _LISTS,
        other_guidance=_true_cfg("FluxPipeline"),
        contexts=("cond", "uncond"),
        missing=missing("FluxPipeline"),
    ),
    Family(
        "flux_controlnet",
        make_controlnet,
        call_controlnet,
        ("cond",),
        _LISTS,
        other_guidance=_true_cfg("FluxControlNetPipeline"),
        missing=missing("FluxControlNetPipeline", "FluxControlNetModel"),
    ),
    Family(
        "flux_img2img",
        make_img2img,
        call_img2img,
        ("cond",),
        _LISTS,
        other_guidance=_true_cfg("FluxImg2ImgPipeline"),
        missing=missing("FluxImg2ImgPipeline"),
    ),
)

"""Wan: text to video, with two experts, and video to video."""

from __future__ import annotations

from typing import Any

from .base import Family, assemble, build, flow_euler, missing, normal, unipc_flow

CHANNELS, TEXT = 4, 24
CONFIG = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "text_dim": TEXT,
    "freq_dim": 32,
    "ffn_dim": 64,
    "num_layers": 6,
    "rope_max_seq_len": 32,
}


def transformer(seed: int, **config: Any) -> Any:
    return build("WanTransformer3DModel", seed, **{**CONFIG, **config})


def make(seed: int = 0, scheduler: Any = None, **config: Any) -> Any:
    return assemble(
        "WanPipeline",
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=scheduler or flow_euler(),
        transformer=transformer(seed, **config),
    )


def make_two_experts(seed: int = 0, scheduler: Any = None, boundary_ratio: float = 0.8, **config: Any) -> Any:
    """Wan2.2: the boundary gives each expert half of the steps of a 6- or 12-step run."""
    return assemble(
        "WanPipeline",
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=scheduler or unipc_flow(),
        transformer=transformer(seed, **config),
        transformer_2=transformer(seed + 1000, **config),
        boundary_ratio=boundary_ratio,
    )


def prompts(seed: int, batch: int, guided: bool) -> dict[str, Any]:
    embeds = {"prompt_embeds": normal(batch, 7, TEXT, seed=seed, key="prompt")}
    if guided:
        embeds["negative_prompt_embeds"] = normal(batch, 7, TEXT, seed=seed, key="negative")
    return embeds


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
    shape = (batch, CHANNELS, (frames - 1) // 4 + 1, height // 8, width // 8)
    return {
        **prompts(seed, batch, scale > 1),
        "latents": normal(*shape, seed=seed, key="latents"),
        "height": height,
        "width": width,
        "num_frames": frames,
        "num_inference_steps": steps,
        "guidance_scale": scale,
        "output_type": "latent",
        **more,
    }


def make_video_to_video(seed: int = 0, scheduler: Any = None, **config: Any) -> Any:
    vae = build(
        "AutoencoderKLWan",
        seed,
        base_dim=4,
        z_dim=CHANNELS,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.0] * CHANNELS,
        latents_std=[1.0] * CHANNELS,
    )
    return assemble(
        "WanVideoToVideoPipeline",
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        scheduler=scheduler or unipc_flow(),
        transformer=transformer(seed, **config),
    )


def call_video_to_video(
    pipe: Any,
    steps: int = 6,
    seed: int = 0,
    batch: int = 1,
    size: tuple[int, ...] | None = None,
    guidance: float | None = None,
    strength: float = 1.0,
    **more: Any,
) -> dict[str, Any]:
    """`strength` below 1 drops the first steps of the schedule; the clip's latents are given, so no VAE runs."""
    kwargs = call(pipe, steps, seed, batch, size, guidance, **more)
    del kwargs["num_frames"]
    return {**kwargs, "strength": strength}


_CFG = ("cond", "uncond")
FAMILIES = (
    Family("wan", make, call, _CFG, ("blocks",), (64, 96, 9), (1.0, ("cond",)), _CFG, missing=missing("WanPipeline")),
    Family(
        "wan22",
        make_two_experts,
        call,
        _CFG,
        ("blocks",),
        (64, 96, 9),
        (1.0, ("cond",)),
        _CFG,
        ("transformer", "transformer_2"),
        missing=missing("WanPipeline"),
    ),
    Family(
        "wan_v2v",
        make_video_to_video,
        call_video_to_video,
        _CFG,
        ("blocks",),
        (64, 96, 9),
        (1.0, ("cond",)),
        missing=missing("WanVideoToVideoPipeline"),
    ),
)

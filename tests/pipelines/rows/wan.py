"""Wan and what is built on it: image to video, VACE, Animate, SkyReels V2 with diffusion forcing, ChronoEdit, Lucy."""

from __future__ import annotations

from typing import Any

from PIL import Image

from pipelines.base import Case, model, photo, pipeline, values, words
from pipelines.vaes import wan_vae
from zoo.base import unipc_flow
from zoo.wan import CHANNELS, TEXT

WAN = "WanTransformer3DModel"
PHOTO = photo()
OF_IMAGE = 16
CLIP = [PHOTO] * 5


def wan(
    name: str,
    call: dict[str, Any],
    label: str = "",
    kind: str = WAN,
    second: bool = False,
    parts: dict[str, Any] | None = None,
    scheduler: Any = unipc_flow,
    **changes: Any,
) -> Case:
    def make() -> Any:
        more = {"transformer_2": model(kind, **changes), "boundary_ratio": 0.8} if second else {}
        transformer = model(kind, **changes)
        vae = wan_vae(CHANNELS)
        pipe = pipeline(name, vae=vae, transformer=transformer, scheduler=scheduler(), **more, **(parts or {}))
        pipe.encode_image = lambda *_, **__: values(1, 5, OF_IMAGE, key="image")
        return pipe

    return Case(name, make, lambda: {**words(TEXT), "num_frames": 5, **call}, label, (kind,))


def without_frames(case: Case) -> Case:
    """For a class that takes the length of a clip that it is given."""
    return Case(case.name, case.make, lambda: {k: v for k, v in case.call().items() if k != "num_frames"}, case.label)


SKY = "SkyReelsV2Transformer3DModel"
WITH_IMAGE = {"in_channels": 2 * CHANNELS + 4, "image_dim": OF_IMAGE}
SEEN = {"image": PHOTO}
FORCING = {"num_frames": 17, "base_num_frames": 17}
LONG = {"num_frames": 29, "base_num_frames": 17, "overlap_history": 5, "addnoise_condition": 20}

CASES = (
    wan("WanImageToVideoPipeline", SEEN, **WITH_IMAGE),
    wan("WanImageToVideoPipeline", SEEN, "two experts", second=True, **WITH_IMAGE),
    wan(
        "WanImageToVideoPipeline",
        {"image": PHOTO},
        "a timestep for each token",
        parts={"expand_timesteps": True},
    ),
    wan("WanPipeline", {}, "a timestep for each token", parts={"expand_timesteps": True}),
    wan(
        "WanVACEPipeline",
        {"video": CLIP, "mask": [Image.new("L", (64, 64), 255)] * 5},
        kind="WanVACETransformer3DModel",
        num_layers=4,
        vace_layers=[0, 2],
        vace_in_channels=2 * CHANNELS + 64,
    ),
    wan(
        "WanVACEPipeline",
        {"reference_images": [PHOTO]},
        "two experts, a reference",
        kind="WanVACETransformer3DModel",
        second=True,
        num_layers=4,
        vace_layers=[0, 2],
        vace_in_channels=2 * CHANNELS + 64,
    ),
    wan("LucyEditPipeline", {"video": CLIP}, in_channels=2 * CHANNELS),
    wan(
        "ChronoEditPipeline",
        SEEN,
        kind="ChronoEditTransformer3DModel",
        **WITH_IMAGE,
    ),
    wan(
        "ChronoEditPipeline",
        {**SEEN, "num_frames": 17, "enable_temporal_reasoning": True, "num_temporal_reasoning_steps": 4},
        "with temporal reasoning",
        kind="ChronoEditTransformer3DModel",
        **WITH_IMAGE,
    ),
    wan("SkyReelsV2Pipeline", {}, kind=SKY),
    wan("SkyReelsV2ImageToVideoPipeline", SEEN, kind=SKY, **WITH_IMAGE),
    wan("SkyReelsV2DiffusionForcingPipeline", FORCING, "all frames at once", kind=SKY),
    wan("SkyReelsV2DiffusionForcingPipeline", {**FORCING, "ar_step": 2, "causal_block_size": 1}, "by turns", kind=SKY),
    wan("SkyReelsV2DiffusionForcingPipeline", LONG, "long", kind=SKY),
    wan(
        "SkyReelsV2DiffusionForcingImageToVideoPipeline",
        {"image": PHOTO, **FORCING, "ar_step": 2, "causal_block_size": 1},
        kind=SKY,
    ),
    wan("SkyReelsV2DiffusionForcingVideoToVideoPipeline", {"video": CLIP, **LONG}, kind=SKY),
)

"""Cosmos."""

from __future__ import annotations

from typing import Any

import diffusers

from classes.base import TEXT
from pipelines.base import Case, model, photo, pipeline, values, words
from pipelines.vaes import cosmos_vae, wan_vae
from zoo.base import unipc_flow

COSMOS = "CosmosTransformer3DModel"
PHOTO = photo()


class Unguarded:
    """In place of the guardrails, whose models come from a hub."""

    def to(self, *_: Any, **__: Any) -> Any:
        return self

    def check_text_safety(self, *_: Any) -> bool:
        return True

    def check_video_safety(self, video: Any) -> Any:
        return video


def edm() -> Any:
    return diffusers.EDMEulerScheduler(sigma_min=0.002, sigma_max=80, prediction_type="epsilon", sigma_data=1.0)


def flow_karras() -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)


def cosmos(name: str, call: dict[str, Any], label: str = "", scheduler: Any = flow_karras, **changes: Any) -> Case:
    def make() -> Any:
        parts = {
            "transformer": model(COSMOS, **changes),
            "vae": cosmos_vae(4) if scheduler is edm else wan_vae(4),
            "scheduler": scheduler(),
        }
        pipe = pipeline(name, safety_checker=Unguarded(), **parts)
        pipe.encode_prompt = lambda *_, **__: (values(1, 7, TEXT, key="p"), values(1, 7, TEXT, key="n"))
        return pipe

    return Case(name, make, lambda: {**words(TEXT), **call}, label, (COSMOS,))


SEEN = {"in_channels": 5}
CASES = (
    cosmos("CosmosTextToWorldPipeline", {"num_frames": 5}, scheduler=edm),
    cosmos("CosmosVideoToWorldPipeline", {"num_frames": 9, "image": PHOTO}, scheduler=edm, **SEEN),
    cosmos("Cosmos2TextToImagePipeline", {}),
    cosmos("Cosmos2VideoToWorldPipeline", {"num_frames": 5, "image": PHOTO}, **SEEN),
    cosmos("Cosmos2_5_PredictBasePipeline", {"num_frames": 5}, scheduler=unipc_flow, **SEEN),
)

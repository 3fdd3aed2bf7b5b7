"""Sound."""

from __future__ import annotations

from typing import Any

import diffusers

from classes.base import TEXT
from pipelines.base import made, values
from pipelines.rows.pictures import case
from pipelines.vaes import oobleck

CASES = (
    case(
        "StableAudioPipeline",
        "StableAudioDiTModel",
        {
            **{f"{each}prompt_embeds": values(1, 7, TEXT, key=each) for each in ("", "negative_")},
            "audio_end_in_s": 1.0,
            "guidance_scale": 1.5,
        },
        scheduler=lambda: diffusers.EDMDPMSolverMultistepScheduler(
            prediction_type="v_prediction", sigma_schedule="exponential"
        ),
        parts=lambda: {"vae": oobleck(4), "projection_model": _projection()},
        sample_size=16,
        global_states_input_dim=2 * TEXT,
    ),
)


def _projection() -> Any:
    return made(
        diffusers.StableAudioProjectionModel, text_encoder_dim=TEXT, conditioning_dim=TEXT, min_value=0, max_value=32
    )

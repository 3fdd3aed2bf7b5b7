"""What is computed again and again with one result, or for nothing: which models have it."""

from __future__ import annotations

from dataclasses import replace

from sgl_diffusion_accel.lossless.constants.constant import Constant, Constants
from sgl_diffusion_accel.lossless.constants.idle_guidance import COMPONENT
from sgl_diffusion_accel.targets import Target

_EQUAL_TIMESTEPS = ("WanTransformer3DModel", "ChronoEditTransformer3DModel")
"""Classes that take a timestep for each token, and compute the modulation of each."""

_IDLE_GUIDANCE = ("WanTransformer3DModel",)
"""Classes of a second expert whose pipelines compute the branch without the prompt by the first one's guidance."""


_TEXT, _MASK = "encoder_hidden_states", "encoder_attention_mask"
_KEYS_AND_VALUES = ("attn2.to_k", "attn2.to_v")


def _captions(*before: str, of: tuple[str, ...] = (_TEXT, _MASK)) -> tuple[Constant, ...]:
    """What a prompt goes through before the blocks, of which the last one's output is looked at in each of them."""
    parts = [Constant(part, of, before[:place]) for place, part in enumerate(before)]
    return (*parts[:-1], replace(parts[-1], layers=_KEYS_AND_VALUES))


ONCE_A_RUN: dict[str, Constants] = {
    # The other two tell where padding is cut, which the projection's tokens go by.
    "Ideogram4Transformer2DModel": Constants(
        (Constant("llm_cond_proj", (_TEXT, "indicator", "segment_ids"), before=("llm_cond_norm",)),)
    ),
    "LTX2VideoTransformer3DModel": Constants(
        (
            *_captions("caption_projection"),
            Constant(
                "audio_caption_projection",
                ("audio_encoder_hidden_states", "audio_encoder_attention_mask"),
                layers=("audio_attn2.to_k", "audio_attn2.to_v"),
            ),
        ),
        "transformer_blocks",
        latents=(("audio_", "audio_hidden_states"), ("", "hidden_states")),
        unless=(("prompt_modulation", "each block scales and shifts the text, as LTX-2.3 does by the timestep"),),
    ),
    "LTXVideoTransformer3DModel": Constants(_captions("caption_projection"), "transformer_blocks"),
    "PixArtTransformer2DModel": Constants(_captions("caption_projection"), "transformer_blocks"),
    "SanaTransformer2DModel": Constants(_captions("caption_projection", "caption_norm"), "transformer_blocks"),
    "SanaVideoTransformer3DModel": Constants(_captions("caption_projection", "caption_norm"), "transformer_blocks"),
    "WanTransformer3DModel": Constants(
        _captions("condition_embedder.text_embedder", of=(_TEXT,)),
        "blocks",
        unless=(("condition_embedder.image_embedder", "each call joins the tokens of a picture to its text"),),
    ),
}
"""Class to its parts that depend on the prompt alone."""


def may_have_equal_timesteps(model: str) -> bool:
    """Whether a class takes a timestep for each token, which may all be one."""
    return model in _EQUAL_TIMESTEPS


def may_have_idle_guidance(target: Target, model: str) -> bool:
    """Whether a component may be called without the prompt for nothing.

    Args:
        target: The component.
        model: Name of the class whose `forward` it has.
    """
    return target.name == COMPONENT and model in _IDLE_GUIDANCE

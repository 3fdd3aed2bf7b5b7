"""What is computed again and again with one result, or for nothing: which models have it."""

from __future__ import annotations

from sgl_diffusion_accel.lossless.constants.idle_guidance import COMPONENT
from sgl_diffusion_accel.lossless.constants.once_a_run import Constant
from sgl_diffusion_accel.targets import Target

_EQUAL_TIMESTEPS = ("WanTransformer3DModel", "ChronoEditTransformer3DModel")
"""Classes that take a timestep for each token, and compute the modulation of each."""

_IDLE_GUIDANCE = ("WanTransformer3DModel",)
"""Classes of a second expert whose pipelines compute the branch without the prompt by the first one's guidance."""


ONCE_A_RUN = {
    # The other two tell where padding is cut, which the projection's tokens go by.
    "Ideogram4Transformer2DModel": Constant(
        "llm_cond_proj", ("encoder_hidden_states", "indicator", "segment_ids"), before=("llm_cond_norm",)
    ),
}
"""Class to its part that depends on the prompt alone."""


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

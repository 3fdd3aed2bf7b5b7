"""The miniatures: which diffusers classes they are made of, and how their pipelines are called."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from .captioned import EMOJI, Captioned
from .world import CLIPS, PICTURES, World

TEXT_DIM = 64
"""Width of a word's embedding vector."""

FLOW_UNIPC: Mapping[str, Any] = MappingProxyType(
    {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0, "num_train_timesteps": 1000}
)


@dataclass(frozen=True)
class Spec:
    """What one miniature is.

    Attributes:
        pipeline: name of the diffusers pipeline class.
        transformer: name of the diffusers transformer class.
        config: arguments of the transformer class.
        scheduler: arguments of `FlowMatchEulerDiscreteScheduler`, those of the full-size model.
        world: what it has learned to show.
        guidance: usual guidance scale; 1 means a single branch.
        packed: whether the pipeline's latents are patches in a row, `[B, 64, 12]` for those of 2 x 2 pixels.
        timestep_scale: timestep that the transformer is given at sigma 1.
        dropout: share of the training samples without a caption.
        patch: width of a packed patch in pixels.
    """

    pipeline: str
    transformer: str
    config: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    world: World | Captioned
    guidance: float
    packed: bool
    timestep_scale: float
    dropout: float = 0.15
    patch: int = 2
    unipc: Mapping[str, Any] = field(default_factory=lambda: FLOW_UNIPC)

    @property
    def drawn(self) -> World:
        """Its world, where that draws the pictures itself.

        Raises:
            TypeError: its pictures are given: there is nothing to draw, to train on without data, or to check.
        """
        if not isinstance(self.world, World):
            raise TypeError("the pictures of this miniature are given, not drawn; expected one of specs.DRAWN")
        return self.world


SPECS: Mapping[str, Spec] = MappingProxyType(
    {
        "wan": Spec(
            pipeline="WanPipeline",
            transformer="WanTransformer3DModel",
            config={
                "patch_size": (1, 2, 2),
                "num_attention_heads": 4,
                "attention_head_dim": 32,
                "in_channels": 3,
                "out_channels": 3,
                "text_dim": TEXT_DIM,
                "freq_dim": 256,
                "ffn_dim": 384,
                "num_layers": 12,
                "cross_attn_norm": True,
                "qk_norm": "rms_norm_across_heads",
                "rope_max_seq_len": 64,
            },
            scheduler={"shift": 3.0},
            world=CLIPS,
            guidance=4.0,
            packed=False,
            timestep_scale=1000.0,
        ),
        "qwen": Spec(
            pipeline="QwenImagePipeline",
            transformer="QwenImageTransformer2DModel",
            config={
                "patch_size": 2,
                "in_channels": 12,
                "out_channels": 3,
                "num_layers": 12,
                "attention_head_dim": 32,
                "num_attention_heads": 3,
                "joint_attention_dim": TEXT_DIM,
                "axes_dims_rope": (8, 12, 12),
            },
            scheduler={
                "use_dynamic_shifting": True,
                "base_shift": 0.5,
                "max_shift": 0.9,
                "base_image_seq_len": 256,
                "max_image_seq_len": 8192,
                "shift_terminal": 0.02,
                "time_shift_type": "exponential",
            },
            world=PICTURES,
            guidance=4.0,
            packed=True,
            timestep_scale=1.0,
        ),
        "emoji": Spec(
            pipeline="QwenImagePipeline",
            transformer="QwenImageTransformer2DModel",
            config={
                "patch_size": 2,
                "in_channels": 48,
                "out_channels": 12,
                "num_layers": 12,
                "attention_head_dim": 32,
                "num_attention_heads": 7,
                "joint_attention_dim": 128,
                "axes_dims_rope": (8, 12, 12),
            },
            scheduler={
                "use_dynamic_shifting": True,
                "base_shift": 0.5,
                "max_shift": 0.9,
                "base_image_seq_len": 256,
                "max_image_seq_len": 8192,
                "shift_terminal": 0.02,
            },
            world=EMOJI,
            guidance=4.0,
            packed=True,
            timestep_scale=1.0,
            patch=4,
        ),
        "flux": Spec(
            pipeline="FluxPipeline",
            transformer="FluxTransformer2DModel",
            config={
                "patch_size": 1,
                "in_channels": 12,
                "num_layers": 4,
                "num_single_layers": 10,
                "attention_head_dim": 32,
                "num_attention_heads": 3,
                "joint_attention_dim": TEXT_DIM,
                "pooled_projection_dim": TEXT_DIM,
                "guidance_embeds": False,
                "axes_dims_rope": (8, 12, 12),
            },
            scheduler={
                "use_dynamic_shifting": True,
                "base_shift": 0.5,
                "max_shift": 1.15,
                "base_image_seq_len": 256,
                "max_image_seq_len": 4096,
            },
            world=PICTURES,
            guidance=1.0,
            packed=True,
            timestep_scale=1.0,
            dropout=0.0,
        ),
    }
)

NAMES: tuple[str, ...] = tuple(SPECS)
"""Names of the miniatures."""

DRAWN: tuple[str, ...] = tuple(name for name, spec in SPECS.items() if isinstance(spec.world, World))
"""Those whose pictures are drawn (`world.py`), so that samples can be checked and trained on without data."""


def spec_of(name: str) -> Spec:
    """The `Spec` of a miniature.

    Raises:
        ValueError: there is no miniature of that name.
    """
    if name not in SPECS:
        raise ValueError(f"unknown miniature {name!r}; expected one of {', '.join(NAMES)}")
    return SPECS[name]

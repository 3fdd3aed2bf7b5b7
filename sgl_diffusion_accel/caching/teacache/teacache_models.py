"""TeaCache by model: its signal, and the coefficients and thresholds that have been published.

Source: https://github.com/ali-vilab/TeaCache (coefficients and speed-ups as published there, and for Wan with retention
steps as SGLang-Diffusion ships them).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sgl_diffusion_accel.caching.parts.signals import ModulatedInput, Signal, TimeEmbedding
from sgl_diffusion_accel.caching.teacache.coefficients import TeaCacheCoefficients as Fit
from sgl_diffusion_accel.targets import model_class


@dataclass(frozen=True)
class Variant:
    """A released model for which coefficients have been published.

    Attributes:
        fit: Its coefficients, with threshold by published speed-up.
        retained: The same for `use_ret_steps=True`, where there is that choice.
        pixels: Pixels of a picture or frame that it was made for, where that tells it from a sibling.
    """

    fit: Fit
    retained: Fit | None = None
    pixels: int | None = None


VARIANTS = {
    "wan2.1-t2v-1.3b": Variant(
        Fit((2.39676752e3, -1.31110545e3, 2.01331979e2, -8.29855975, 1.37887774e-1), {1.5: 0.05, 1.6: 0.07, 2.0: 0.08}),
        Fit((-5.21862437e4, 9.23041404e3, -5.28275948e2, 1.36987616e1, -4.99875664e-2), {1.6: 0.05, 2.4: 0.10}),
    ),
    "wan2.1-t2v-14b": Variant(
        Fit(
            (-5784.54975374, 5449.50911966, -1811.16591783, 256.27178429, -13.02252404),
            {1.4: 0.14, 1.8: 0.15, 2.0: 0.20},
        ),
        Fit((-3.03318725e5, 4.90537029e4, -2.65530556e3, 5.87365115e1, -3.15583525e-1), {2.0: 0.10, 3.2: 0.20}),
    ),
    "wan2.1-i2v-480p": Variant(
        Fit(
            (-3.02331670e2, 2.23948934e2, -5.25463970e1, 5.87348440, -2.01973289e-1),
            {1.6: 0.13, 2.0: 0.19, 2.4: 0.26},
        ),
        Fit((2.57151496e5, -3.54229917e4, 1.40286849e3, -1.35890334e1, 1.32517977e-1), {1.8: 0.20, 2.3: 0.30}),
        pixels=480 * 832,
    ),
    "wan2.1-i2v-720p": Variant(
        Fit((-114.36346466, 65.26524496, -18.82220707, 4.91518089, -0.23412683), {1.7: 0.18, 1.9: 0.20, 2.4: 0.30}),
        Fit((8.10705460e3, 2.13393892e3, -3.72934672e2, 1.66203073e1, -4.17769401e-2), {2.1: 0.20, 2.7: 0.30}),
        pixels=720 * 1280,
    ),
    "hunyuanvideo": Variant(
        Fit((7.33226126e2, -4.01131952e2, 6.75869174e1, -3.14987800, 9.61237896e-2), {1.6: 0.10, 2.1: 0.15})
    ),
    "flux.1-dev": Variant(
        Fit(
            (4.98651651e2, -2.83781631e2, 5.58554382e1, -3.82021401, 2.64230861e-1),
            {1.5: 0.25, 1.8: 0.4, 2.0: 0.6, 2.25: 0.8},
        )
    ),
    "cogvideox-2b": Variant(  # thresholds as for 5b: none of its own are published
        Fit(
            (-3.10658903e1, 2.54732368e1, -5.92380459, 1.75769064, -3.61568434e-3),
            {1.6: 0.1, 2.1: 0.15, 2.5: 0.2},
        )
    ),
    "cogvideox-5b": Variant(
        Fit(
            (-1.53880483e3, 8.43202495e2, -1.34363087e2, 7.97131516, -5.23162339e-2),
            {1.6: 0.1, 2.1: 0.15, 2.5: 0.2},
        )
    ),
    "cogvideox1.5-5b": Variant(
        Fit(
            (2.50210439e2, -1.65061612e2, 3.57804877e1, -7.81551492e-1, 3.58559703e-2),
            {1.3: 0.1, 1.8: 0.2, 2.1: 0.3},
        )
    ),
    "cogvideox1.5-5b-i2v": Variant(  # thresholds as for text to video: none of its own are published
        Fit(
            (1.22842302e2, -1.04088754e2, 2.62981677e1, -3.06009921e-1, 3.71213220e-2),
            {1.3: 0.1, 1.8: 0.2, 2.1: 0.3},
        )
    ),
    "ltx-video": Variant(
        Fit((2.14700694e1, -1.28016453e1, 2.31279151, 7.92487521e-1, 9.69274326e-3), {1.6: 0.03, 2.1: 0.05})
    ),
    "mochi-1": Variant(
        Fit((-3.51241319e3, 8.11675948e2, -6.09400215e1, 2.42429681, 3.05291719e-3), {1.5: 0.06, 2.1: 0.09})
    ),
    "lumina2": Variant(
        Fit(
            (393.76566581, -603.50993606, 209.10239044, -23.00726601, 0.86377344),
            {1.5: 0.2, 1.9: 0.3, 2.4: 0.4, 2.8: 0.5},
        )
    ),
    "hidream-i1": Variant(
        Fit(
            (-3.13605009e4, -7.12425503e2, 4.91363285e1, 8.26515490, 1.08053901e-1),
            {1.5: 0.17, 1.7: 0.25, 2.0: 0.3, 2.6: 0.45},
        )
    ),
    "cosmos": Variant(Fit((2.71156237e2, -9.19775607e1, 2.24437250, 2.08355751, 1.41776330e-1), {1.4: 0.3, 2.0: 0.4})),
}
"""By the name that `variant=` takes."""


@dataclass(frozen=True)
class Family:
    """What TeaCache knows of a transformer class.

    Attributes:
        signal: The signal that its coefficients were fitted on.
        retained: The signal for `use_ret_steps=True`; None where there is no such choice.
        variants: Names in `VARIANTS` that go with the class.
        choose: Narrows them down by the model's config: to one, or to several that the run's resolution tells apart,
            or to none where nothing was published for such a model.
    """

    signal: Signal = field(default_factory=ModulatedInput)
    retained: Signal | None = None
    variants: tuple[str, ...] = ()
    choose: Callable[[Any], tuple[str, ...]] | None = None

    def variants_for(self, config: Any) -> tuple[str, ...]:
        """The variants that a model with this config may be."""
        return self.variants if self.choose is None else self.choose(config)

    def signal_for(self, retains: bool) -> Signal:
        """The signal, with retention steps or without."""
        return self.retained if retains and self.retained is not None else self.signal


def family_of(transformer: nn.Module) -> Family:
    """The family of a transformer; one that is not in the table has the modulated input for its signal."""
    return FAMILIES.get(model_class(transformer).__name__, Family())


def nearest_size(sizes: Sequence[int | None], latents: torch.Size) -> int:
    """Index of the size that is nearest to a run's, by ratio.

    Args:
        sizes: In pixels of a frame.
        latents: Shape of the latents, `[B, C, (F,) H, W]`, 8 times smaller than the frame in both directions.
    """
    pixels = latents[-1] * latents[-2] * 64
    return min(range(len(sizes)), key=lambda i: abs(math.log(pixels / (sizes[i] or pixels))))


def _wan_temb(transformer: Any, timesteps: Tensor, dtype: torch.dtype) -> Tensor:  # noqa: ARG001
    """In the precision of the embedder, which checkpoints keep in float32, as the coefficients were fitted."""
    embedder = transformer.condition_embedder
    waves: Tensor = embedder.timesteps_proj(timesteps)
    own = next(embedder.time_embedder.parameters()).dtype
    embedding: Tensor = embedder.time_embedder(waves.to(own) if own.is_floating_point else waves)
    return embedding


def _wan_timestep_proj(transformer: Any, timesteps: Tensor, dtype: torch.dtype) -> Tensor:
    embedder = transformer.condition_embedder
    projection: Tensor = embedder.time_proj(embedder.act_fn(_wan_temb(transformer, timesteps, dtype).to(dtype)))
    return projection


def _cogvideox_embedding(transformer: Any, timesteps: Tensor, dtype: torch.dtype) -> Tensor:
    embedding: Tensor = transformer.time_embedding(transformer.time_proj(timesteps).to(dtype))
    if getattr(transformer, "ofs_embedding", None) is not None:
        ofs = transformer.ofs_proj(torch.full((1,), 2.0, dtype=dtype, device=timesteps.device))  # as its pipelines give
        embedding = embedding + transformer.ofs_embedding(ofs.to(dtype))
    return embedding


def _hidream_embedding(transformer: Any, timesteps: Tensor, dtype: torch.dtype) -> Tensor:
    embedding: Tensor = transformer.t_embedder(timesteps, dtype)
    return embedding


_LARGE_WIDTH = 3000  # Wan 1.3B is 1,536 wide, 14B 5,120
_WAN22_SMALL_CHANNELS = 48  # Wan2.2 5B, on a VAE of its own


def _choose_wan(config: Any) -> tuple[str, ...]:
    if config.in_channels == _WAN22_SMALL_CHANNELS == config.out_channels:
        return ()
    if config.image_dim is not None or config.in_channels > config.out_channels:
        return ("wan2.1-i2v-480p", "wan2.1-i2v-720p")
    is_large = config.num_attention_heads * config.attention_head_dim > _LARGE_WIDTH
    return ("wan2.1-t2v-14b",) if is_large else ("wan2.1-t2v-1.3b",)


def _choose_cogvideox(config: Any) -> tuple[str, ...]:
    if config.patch_size_t is not None:
        from_image = config.ofs_embed_dim is not None or config.in_channels > config.out_channels
        return ("cogvideox1.5-5b-i2v",) if from_image else ("cogvideox1.5-5b",)
    return ("cogvideox-5b",) if config.use_rotary_positional_embeddings else ("cogvideox-2b",)


_WAN = tuple(name for name in VARIANTS if name.startswith("wan"))
_COGVIDEOX = tuple(name for name in VARIANTS if name.startswith("cogvideox"))
_WAN_SIGNALS = (TimeEmbedding(_wan_temb), TimeEmbedding(_wan_timestep_proj))

FAMILIES = {
    "WanTransformer3DModel": Family(*_WAN_SIGNALS, _WAN, _choose_wan),
    "WanVACETransformer3DModel": Family(*_WAN_SIGNALS, _WAN, lambda _: ()),
    "CogVideoXTransformer3DModel": Family(
        TimeEmbedding(_cogvideox_embedding), variants=_COGVIDEOX, choose=_choose_cogvideox
    ),
    "ConsisIDTransformer3DModel": Family(TimeEmbedding(_cogvideox_embedding), variants=("cogvideox-5b",)),
    "HiDreamImageTransformer2DModel": Family(TimeEmbedding(_hidream_embedding), variants=("hidream-i1",)),
    "FluxTransformer2DModel": Family(variants=("flux.1-dev",)),
    "HunyuanVideoTransformer3DModel": Family(variants=("hunyuanvideo",)),
    "LTXVideoTransformer3DModel": Family(variants=("ltx-video",)),
    "MochiTransformer3DModel": Family(variants=("mochi-1",)),
    "Lumina2Transformer2DModel": Family(variants=("lumina2",)),
    "LuminaNextDiT2DModel": Family(variants=("lumina2",)),
    "CosmosTransformer3DModel": Family(variants=("cosmos",)),
}
"""By class name. A class that is not here has the modulated input, and needs coefficients of its own."""

"""The models that are timed: true configurations, random weights made on the device, prompts as random embeddings.

Times and memory depend on shapes and not on what the weights have learned, so nothing needs to be downloaded. What
random weights cannot show is the quality of a picture.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

_GIB = 2**30
_WEIGHTS_STD = 0.02
_LISTS = ("transformer_blocks", "single_transformer_blocks", "blocks")


@dataclass(frozen=True)
class Place:
    """Where a model is built and how large.

    Attributes:
        device: Of the weights.
        dtype: Of the weights, but for those that the class keeps in float32.
        tiny: Whether the tiny configuration is built, for a test on a CPU.
    """

    device: torch.device
    dtype: torch.dtype
    tiny: bool = False

    def draw(self, *shape: int) -> Tensor:
        """The same random numbers each time."""
        generator = torch.Generator(self.device).manual_seed(0)
        return torch.randn(shape, generator=generator, device=self.device, dtype=self.dtype)


@dataclass(frozen=True)
class Built:
    """A pipeline, the arguments to call it with, and what it is, for the report."""

    pipe: Any
    call: dict[str, Any]
    about: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Model:
    """A model at its true configuration.

    Attributes:
        title: What it is called in tables.
        pipeline: Class of diffusers.
        transformer: Class of diffusers.
        config: What differs from the defaults of the transformer's class; a depth below the released one cuts it.
        tiny: What differs in the tiny configuration.
        released: Blocks of the released model, list by list.
        absent: Parts of the pipeline that are None.
        scheduler: Makes the scheduler.
        call: Makes the arguments of a call from the place, the transformer's config and the size.
        size: Height, width and frames.
        tiny_size: The same in the tiny configuration.
    """

    title: str
    pipeline: str
    transformer: str
    config: Mapping[str, Any]
    tiny: Mapping[str, Any]
    released: tuple[int, ...]
    absent: tuple[str, ...]
    scheduler: Callable[[], Any]
    call: Callable[[Place, Any], dict[str, Any]]
    size: tuple[int, int, int]
    tiny_size: tuple[int, int, int]


def build(model: Model, place: Place, **config: Any) -> Built:
    """A pipeline without VAE and text encoder.

    Args:
        model: Which one.
        place: Where and how large.
        config: What differs further from the configuration, such as `num_layers`.
    """
    chosen = {**model.config, **(model.tiny if place.tiny else {}), **config}
    transformer = make_transformer(getattr(diffusers, model.transformer), chosen, place)
    pipe = getattr(diffusers, model.pipeline)(
        transformer=transformer, scheduler=model.scheduler(), **dict.fromkeys(model.absent)
    )
    pipe.set_progress_bar_config(disable=True)
    height, width, frames = model.tiny_size if place.tiny else model.size
    call = model.call(place, transformer.config) | {"height": height, "width": width, "output_type": "latent"}
    if frames > 1:
        call["num_frames"] = frames
    parameters = list(transformer.parameters())
    about = {
        "title": model.title + (", tiny" if place.tiny else ""),
        "pipeline": model.pipeline,
        "config": {key: list(value) if isinstance(value, tuple) else value for key, value in chosen.items()},
        "blocks": [len(each) for each in block_lists(transformer)],
        "blocks_released": list(model.released),
        "height": height,
        "width": width,
        "frames": frames,
        "text_tokens": call["prompt_embeds"].shape[1],
        "guidance": {key: call[key] for key in ("guidance_scale", "true_cfg_scale") if key in call},
        "dtype": str(place.dtype).removeprefix("torch."),
        "parameters": sum(each.numel() for each in parameters),
        "weights_gib": sum(each.numel() * each.element_size() for each in parameters) / _GIB,
    }
    return Built(pipe, call, about)


def make_transformer(transformer: type[nn.Module], config: Mapping[str, Any], place: Place) -> Any:
    """A transformer whose weights are made on the device, so that the host never holds them.

    Norm weights are 1, biases 0, all others drawn from a normal distribution of standard deviation 0.02.
    """
    with init_empty_weights(include_buffers=False):  # buffers hold what is computed, such as rotary tables
        made = transformer(**config)
    kept = set(getattr(made, "_keep_in_fp32_modules", None) or ())
    generator = torch.Generator(place.device).manual_seed(0)
    for name, parameter in list(made.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        dtype = torch.float32 if kept & set(name.split(".")) else place.dtype
        weight = torch.empty(parameter.shape, dtype=dtype, device=place.device)
        if leaf == "bias":
            weight.zero_()
        elif weight.ndim == 1 and leaf == "weight":
            weight.fill_(1)
        else:
            weight.normal_(0, _WEIGHTS_STD, generator=generator)
        setattr(made.get_submodule(owner), leaf, nn.Parameter(weight, requires_grad=False))
    return made.to(place.device).eval()


def block_lists(transformer: nn.Module) -> list[nn.ModuleList]:
    """The lists of blocks of a transformer, in the order in which they run."""
    found = [getattr(transformer, name, None) for name in _LISTS]
    return [each for each in found if isinstance(each, nn.ModuleList)]


def release(built: Built) -> None:
    """Gives the weights' memory back, also where something still holds the modules, as global tables of peers do."""
    built.pipe.transformer.to("meta")
    built.call.clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _flow_euler(**shift: float) -> Callable[[], Any]:
    return lambda: diffusers.FlowMatchEulerDiscreteScheduler(**shift)


def _unipc() -> Any:
    return diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def _flux_call(place: Place, config: Any) -> dict[str, Any]:
    return {
        "prompt_embeds": place.draw(1, _tokens(512, place), config.joint_attention_dim),
        "pooled_prompt_embeds": place.draw(1, config.pooled_projection_dim),
        "guidance_scale": 3.5,
    }


def _qwen_call(place: Place, config: Any) -> dict[str, Any]:
    both = place.draw(2, _tokens(128, place), config.joint_attention_dim)
    valid = torch.ones(both.shape[:2], dtype=torch.long, device=place.device)
    return {
        "prompt_embeds": both[:1],
        "prompt_embeds_mask": valid[:1],
        "negative_prompt_embeds": both[1:],
        "negative_prompt_embeds_mask": valid[1:],
        "true_cfg_scale": 4.0,
    }


def _wan_call(place: Place, config: Any) -> dict[str, Any]:
    both = place.draw(2, _tokens(512, place), config.text_dim)
    return {"prompt_embeds": both[:1], "negative_prompt_embeds": both[1:], "guidance_scale": 5.0}


def _hunyuan_call(place: Place, config: Any) -> dict[str, Any]:
    tokens = _tokens(256, place)
    valid = math.ceil(tokens * 40 / 256)  # a caption of some thirty words; the others are padding
    return {
        "prompt_embeds": place.draw(1, tokens, config.text_embed_dim),
        "pooled_prompt_embeds": place.draw(1, config.pooled_projection_dim),
        "prompt_attention_mask": (torch.arange(tokens, device=place.device) < valid).long()[None],
        "guidance_scale": 6.0,
    }


def _tokens(count: int, place: Place) -> int:
    return min(count, 16) if place.tiny else count


_HEADS = {"num_attention_heads": 2, "attention_head_dim": 32}
_TINY_WAN = {**_HEADS, "num_layers": 4, "ffn_dim": 64, "text_dim": 64}
_TWO_ENCODERS = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")

MODELS = {
    "flux": Model(
        title="FLUX.1-dev 12B, 1024²",
        pipeline="FluxPipeline",
        transformer="FluxTransformer2DModel",
        config={"guidance_embeds": True, "num_layers": 19, "num_single_layers": 38},
        tiny={
            **_HEADS,
            "num_layers": 2,
            "num_single_layers": 3,
            "joint_attention_dim": 64,
            "pooled_projection_dim": 32,
            "axes_dims_rope": (8, 12, 12),
        },
        released=(19, 38),
        absent=_TWO_ENCODERS,
        scheduler=_flow_euler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15),
        call=_flux_call,
        size=(1024, 1024, 1),
        tiny_size=(64, 64, 1),
    ),
    "qwen": Model(
        title="Qwen-Image 20B, 1024², true CFG",
        pipeline="QwenImagePipeline",
        transformer="QwenImageTransformer2DModel",
        config={"num_layers": 60},
        tiny={**_HEADS, "num_layers": 4, "joint_attention_dim": 64, "axes_dims_rope": (8, 12, 12)},
        released=(60,),
        absent=("vae", "text_encoder", "tokenizer"),
        scheduler=_flow_euler(
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=0.9,
            base_image_seq_len=256,
            max_image_seq_len=8192,
            shift_terminal=0.02,
        ),
        call=_qwen_call,
        size=(1024, 1024, 1),
        tiny_size=(64, 64, 1),
    ),
    "wan": Model(
        title="Wan2.1 1.3B, 480p, 81 frames, CFG",
        pipeline="WanPipeline",
        transformer="WanTransformer3DModel",
        config={"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960},
        tiny=_TINY_WAN,
        released=(30,),
        absent=("vae", "text_encoder", "tokenizer"),
        scheduler=_unipc,
        call=_wan_call,
        size=(480, 832, 81),
        tiny_size=(64, 64, 5),
    ),
    "wan_14b": Model(
        title="Wan2.1 14B cut to 3 of 40 blocks, 480p, 81 frames, CFG",
        pipeline="WanPipeline",
        transformer="WanTransformer3DModel",
        config={"num_attention_heads": 40, "num_layers": 3, "ffn_dim": 13824},
        tiny={**_TINY_WAN, "num_layers": 3},
        released=(40,),
        absent=("vae", "text_encoder", "tokenizer"),
        scheduler=_unipc,
        call=_wan_call,
        size=(480, 832, 81),
        tiny_size=(64, 64, 5),
    ),
    "hunyuanvideo": Model(
        title="HunyuanVideo cut to 2 + 4 of 20 + 40 blocks, 544×960, 61 frames",
        pipeline="HunyuanVideoPipeline",
        transformer="HunyuanVideoTransformer3DModel",
        config={"num_layers": 2, "num_single_layers": 4},
        tiny={
            "num_attention_heads": 2,
            "attention_head_dim": 24,
            "num_refiner_layers": 1,
            "rope_axes_dim": (8, 8, 8),
            "text_embed_dim": 32,
            "pooled_projection_dim": 16,
        },
        released=(20, 40),
        absent=_TWO_ENCODERS,
        scheduler=_flow_euler(shift=7.0),
        call=_hunyuan_call,
        size=(544, 960, 61),
        tiny_size=(64, 64, 5),
    ),
}
"""By the name of their part; another model is another row."""

"""What every family of the zoo shares: the `Family` record, seeded weights and seeded tensors."""

from __future__ import annotations

import inspect
import math
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import nn

#: what turns the timestep into an embedding
_TIME = re.compile(
    r"(^|\.)(time(step)?_embedder|time_embeddings?|t_embedder|t_embedding|distilled_guidance_layer\.in_proj)\."
)


class _CapturedError(Exception):
    """Ends a run as soon as the first transformer call was seen."""


@dataclass(frozen=True)
class Family:
    """One pipeline class of diffusers, small enough for tests, with random weights in which every block matters."""

    name: str
    #: make(seed=0, scheduler=None, **transformer_config) -> a fresh pipeline, deterministic in the seed
    make: Callable[..., Any]
    #: call(pipe, steps=6, seed=0, batch=1, size=None, guidance=None, **more) -> keyword arguments of `pipe(...)`;
    #: size is (height, width) in pixels, and (height, width, frames) for video
    call: Callable[..., dict[str, Any]]
    #: one name for each transformer call of a step, in the order of the calls; "cond_uncond" is one batched call
    branches: tuple[str, ...]
    #: attribute names of the transformer's block lists, in the order they run
    block_lists: tuple[str, ...]
    #: a size that differs from the default one
    other_size: tuple[int, ...] = (64, 96)
    #: a `guidance` that the default call does not have, and the branches it leads to
    other_guidance: tuple[float, tuple[str, ...]] | None = None
    #: names that the pipeline gives to `transformer.cache_context`; empty where it does not call it
    contexts: tuple[str, ...] = ()
    #: attribute names of the denoisers of the pipeline
    transformers: tuple[str, ...] = ("transformer",)
    #: whether each branch has a denoiser of its own
    model_per_branch: bool = False
    #: why this diffusers cannot make it; None where it can
    missing: str | None = None

    def run(self, pipe: Any, **kw: Any) -> torch.Tensor:
        """The output of one run; `kw` goes to `call`, so that every run gets its own fresh generator."""
        with torch.no_grad():
            output = pipe(**self.call(pipe, **kw), return_dict=False)
        return tensor_of(output[0]).detach().clone()

    def blocks(self, transformer: nn.Module) -> list[tuple[str, int, nn.Module]]:
        """(list name, index, block) of every block, in the order they run."""
        return [(name, i, block) for name in self.block_lists for i, block in enumerate(getattr(transformer, name))]

    def bare(self, pipe: Any = None, seed: int = 0, **kw: Any) -> dict[str, Any]:
        """Keyword arguments for one direct `pipe.transformer(**kwargs)` call: what a run's first step passes.

        They are recorded on a pipeline of their own; `pipe` tells the dtype alone and is left untouched.
        """
        donor = self.make(seed=seed)
        seen: dict[str, Any] = {}

        def record(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            seen.update(inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments)
            raise _CapturedError

        donor.transformer.register_forward_pre_hook(record, with_kwargs=True)
        with suppress(_CapturedError):
            self.run(donor, seed=seed, **kw)
        seen.pop("self")
        dtype = next((p.dtype for p in pipe.transformer.parameters()), torch.float32) if pipe is not None else None
        return {key: _cast(value, dtype) for key, value in seen.items()}


def tensor_of(output: Any) -> torch.Tensor:
    """The one tensor of a pipeline's or transformer's output, which may be a tuple or a list of tensors."""
    if isinstance(output, torch.Tensor):
        return output
    parts = [tensor_of(part) for part in output]
    return parts[0] if len(parts) == 1 else torch.stack(parts)


def _cast(value: Any, dtype: torch.dtype | None) -> Any:
    if isinstance(value, torch.Tensor) and dtype is not None and value.is_floating_point():
        return value.to(dtype)
    if isinstance(value, (list, tuple)) and any(isinstance(part, torch.Tensor) for part in value):
        return type(value)(_cast(part, dtype) for part in value)
    return value


def missing(*names: str) -> str | None:
    """The reason why this diffusers cannot make a family that needs these classes, or None."""
    lacking = [name for name in names if not hasattr(diffusers, name)]
    return f"diffusers {diffusers.__version__} has no {', '.join(lacking)}" if lacking else None


@contextmanager
def quiet_rng(seed: int) -> Iterator[None]:
    """Seeds torch inside, and leaves the process's generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def normal(*shape: int, seed: int, key: str = "") -> torch.Tensor:
    """A standard normal tensor that depends on the seed, the key and the shape, and on nothing else."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{key}".encode()))
    return torch.randn(*shape, generator=generator)


@torch.no_grad()
def randomise(module: nn.Module, seed: int, gain: float = 1.0) -> nn.Module:
    """Gives every parameter a seeded value of sensible size, those that diffusers starts at zero included.

    Each value depends on the seed and the parameter's name, not on the order of construction. Time embeddings get more
    bias and less weight, so that neighbouring steps resemble each other, as they do in trained models.
    """
    for parameter, value in zip(module.parameters(), _values(module, seed, gain), strict=True):
        parameter.copy_(value)
    return module.eval().requires_grad_(False)


def _values(module: nn.Module, seed: int, gain: float) -> Iterator[torch.Tensor]:
    norms = {id(p) for m in module.modules() if "Norm" in type(m).__name__ for p in m.parameters(recurse=False)}
    for name, parameter in module.named_parameters():
        noise = normal(*parameter.shape, seed=seed, key=name)
        leaf = name.rsplit(".", 1)[-1]
        slow = _TIME.search(name) is not None
        if leaf == "weight" and (parameter.ndim == 1 or id(parameter) in norms):
            value = 1 + 0.1 * noise
        elif leaf == "weight" and parameter.ndim >= 2:
            value = noise * min(gain / math.sqrt(parameter[0].numel()), 0.3) * (0.25 if slow else 1)
        elif leaf == "bias":
            value = (1.0 if slow else 0.1) * noise
        else:  # scale-shift tables, pad tokens, registers
            value = 0.3 * noise
        yield value.to(parameter.dtype)


def build(name: str, seed: int, gain: float = 1.0, **config: Any) -> Any:
    """A model of diffusers with seeded weights, which are made once and copied into each model of the same config."""
    key = (name, seed, gain, repr(config))
    with quiet_rng(seed):
        model = getattr(diffusers, name)(**config)
    if key not in _made:
        if len(_made) >= _MOST_MADE:
            _made.clear()
        _made[key] = [parameter.clone() for parameter in randomise(model, seed, gain).parameters()]
        return model
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), _made[key], strict=True):
            parameter.copy_(value)
    return model.eval().requires_grad_(False)


_made: dict[tuple[Any, ...], list[torch.Tensor]] = {}
_MOST_MADE = 60


def assemble(name: str, **components: Any) -> Any:
    """A pipeline of diffusers, its progress bar off."""
    pipe = getattr(diffusers, name)(**components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def flow_euler(dynamic: bool = False, shift: float = 3.0) -> Any:
    """FlowMatchEulerDiscreteScheduler, its shift fixed or by the size of the picture."""
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0 if dynamic else shift, use_dynamic_shifting=dynamic)


def unipc_flow(shift: float = 3.0) -> Any:
    """The UniPC scheduler as the Wan checkpoints set it."""
    return diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)


def tiny_vae(latent_channels: int, seed: int) -> Any:
    """An AutoencoderKL that shrinks by 8, for the pipelines that encode a picture."""
    return build(
        "AutoencoderKL",
        seed,
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=latent_channels,
        norm_num_groups=2,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )

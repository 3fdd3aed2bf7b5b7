"""What a row is: a pipeline of one class, small, and the arguments of a call of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from classes import ROWS as MODELS
from classes import found as found_models
from zoo.base import normal, quiet_rng, randomise

from .finding import kind_of

STEPS = 8
"""What a pipeline is asked for."""


@dataclass(frozen=True)
class Case:
    """One pipeline class.

    Attributes:
        name: Of the class.
        make: Makes the pipeline, deterministic, in which every block matters.
        call: The keyword arguments of a run of it.
        label: What sets it apart from another case of its class.
        needs: Other classes of diffusers that it is made of.
        steps: What it is asked for.
        near: How far off its output may be when calls are skipped: of random weights, some are rougher than others.
        may_replay: Whether a run can be made again with the outputs of another one.
    """

    name: str
    make: Callable[[], Any]
    call: Callable[[], dict[str, Any]]
    label: str = ""
    needs: tuple[str, ...] = ()
    steps: int = STEPS
    near: float = 0.5
    may_replay: bool = True

    @property
    def key(self) -> str:
        """What the case is known by."""
        return f"{self.name}, {self.label}" if self.label else self.name

    @property
    def missing(self) -> str | None:
        """Why this diffusers cannot make it; None where it can."""
        lacking = [name for name in (self.name, *self.needs) if not has(name)]
        return f"diffusers {diffusers.__version__} has no {', '.join(lacking)}" if lacking else None

    def run(self, pipe: Any) -> Tensor:
        """What a run gives, as one row of numbers."""
        given = usual(type(pipe), self.steps)
        with torch.no_grad(), quiet_rng(0):  # some take noise from torch itself
            return torch.cat([each.flatten().float() for each in tensors_of(pipe(**{**given, **self.call()}))])


def has(name: str) -> bool:
    """Whether the installed diffusers has a class, a transformer that it does not export among them."""
    return kind_of(name) is not None or name in found_models()


def usual(kind: type, steps: int) -> dict[str, Any]:
    """What most pipelines are given, as far as the class takes it."""
    takes = inspect.signature(kind.__call__).parameters
    given = {
        "num_inference_steps": steps,
        "height": 64,
        "width": 64,
        "guidance_scale": 4.0,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(0),
        **{name: None for name, each in takes.items() if each.default is inspect.Parameter.empty and name == "prompt"},
    }
    return {name: value for name, value in given.items() if name in takes}


def tensors_of(output: Any) -> list[Tensor]:
    """The tensors of an output, whatever it is made of."""
    if isinstance(output, np.ndarray):
        output = torch.from_numpy(output)
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, dict):
        return [tensor for part in output.values() for tensor in tensors_of(part)]
    parts = output if isinstance(output, (tuple, list)) else ()
    return [tensor for part in parts for tensor in tensors_of(part)]


def pipeline(name: str, **parts: Any) -> Any:
    """A pipeline of diffusers; of the components that are not given it has none."""
    kind = kind_of(name)
    takes = inspect.signature(kind.__init__).parameters
    empty = {key: None for key, each in takes.items() if key != "self" and each.default is inspect.Parameter.empty}
    with quiet_rng(0):
        pipe = kind(**{**empty, **parts})
    pipe.set_progress_bar_config(disable=True)
    return pipe


_FEW = ("num_layers", "num_single_layers", "n_layers", "num_visual_blocks", "num_hidden_layers", "depth", "dit_depth")
_configs: dict[str, dict[str, Any]] = {}


def model(name: str, **changes: Any) -> Any:
    """A transformer as `classes` has it, with two blocks in a list, and with these changes of its configuration."""
    if name not in _configs:
        config = MODELS[name].make().config
        _configs[name] = {key: value for key, value in config.items() if not key.startswith("_")}
    config = _configs[name]
    few = {key: 2 for key in _FEW if (config.get(key) or 0) > 2}
    return made(found_models()[name], **{**config, **few, **changes})


def made(kind: Any, **config: Any) -> nn.Module:
    """A model of a class, with seeded weights; a name stands for a class of diffusers."""
    with quiet_rng(0):
        return randomise((getattr(diffusers, kind) if isinstance(kind, str) else kind)(**config), 0)


def values(*shape: int, key: str = "") -> Tensor:
    """Seeded normal numbers."""
    return normal(*shape, seed=0, key=key)


def picture(*shape: int, key: str = "picture") -> Tensor:
    """Seeded numbers between 0 and 1, `[1, 3, 64, 64]` where no shape is given."""
    return values(*(shape or (1, 3, 64, 64)), key=key).sigmoid()


def photo(mode: str = "RGB") -> Image.Image:
    """A picture of 64 × 64."""
    numbers = (picture()[0].permute(1, 2, 0) * 255).byte().numpy()
    return Image.fromarray(numbers).convert(mode)


def left_half(*shape: int) -> Tensor:
    """A mask of zeros and ones, `[1, 1, 64, 64]` where no shape is given."""
    mask = torch.zeros(shape or (1, 1, 64, 64))
    mask[..., : mask.shape[-1] // 2] = 1
    return mask


def words(width: int, *, negative: bool = True, mask: str | None = None, count: int = 7) -> dict[str, Any]:
    """Embeddings of a prompt and a negative one, `[1, count, width]`, and the mask under this name."""
    given: dict[str, Any] = {}
    for prefix in ("", "negative_")[: 1 + negative]:
        given[f"{prefix}prompt_embeds"] = values(1, count, width, key=f"{prefix}prompt")
        if mask:
            given[f"{prefix}{mask}"] = torch.ones(1, count, dtype=torch.long)
    return given


@contextmanager
def one_thread() -> Iterator[None]:
    """Small tensors are fastest on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

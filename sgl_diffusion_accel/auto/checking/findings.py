"""What is found on a pipeline before it runs, piece by piece."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Answer = Literal["yes", "in part", "no"]


@dataclass(frozen=True)
class Denoiser:
    """A transformer that denoises.

    Attributes:
        component: Its name in the pipeline.
        model: Name of its class.
        parameters: How many numbers it has.
        weights: Bytes of its weights by dtype: as they are, or what they would be where none are loaded.
        is_loaded: Whether it has weights; without, it was made of its configuration.
        blocks: Attribute name of each list of blocks that caches may skip to their number; empty where there is none.
        wiring: How it is known which output of a block feeds which input of the next one, or why it is not.
        attention: Attention backends that it can have on this machine.
    """

    component: str
    model: str
    parameters: int
    weights: dict[str, int]
    is_loaded: bool
    blocks: dict[str, int]
    wiring: str
    attention: tuple[str, ...]


@dataclass(frozen=True)
class FoundLoop:
    """The denoising loop of a pipeline, as its source tells.

    Attributes:
        is_placed: Whether calls will be placed in it; False where the source does not tell.
        how: By what.
        branches: Names of the branches of guidance, as far as the source tells.
        contexts: Names that it gives to `cache_context`.
        is_batched: Whether cond and uncond may come as one batch.
    """

    is_placed: bool
    how: str
    branches: tuple[str, ...] = ()
    contexts: tuple[str, ...] = ()
    is_batched: bool = False


@dataclass(frozen=True)
class FoundScheduler:
    """A scheduler, tried on numbers.

    Attributes:
        name: Of its class; empty where there is none.
        is_linear: Whether the latents are linear in what the transformer says; None where that was not found out.
        adds_noise: Whether it adds noise of its own.
        looks_back: Whether a step depends on the outputs of earlier ones (UniPC, DPM-Solver).
        what: The same in words.
    """

    name: str
    is_linear: bool | None
    adds_noise: bool
    looks_back: bool
    what: str


@dataclass(frozen=True)
class Verdict:
    """What one patch can do on a pipeline.

    Attributes:
        patch: Its name.
        call: What to type.
        answer: `"yes"`, `"in part"` or `"no"`.
        reason: Why, and what to type where something is missing.
        memory: What it holds while a run lasts, in words.
        held_bytes: The same for the call that was described; None where it cannot be told.
    """

    patch: str
    call: str
    answer: Answer
    reason: str
    memory: str = "nothing"
    held_bytes: int | None = None

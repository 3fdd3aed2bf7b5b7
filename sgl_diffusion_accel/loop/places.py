"""Where a transformer call is in a denoising loop, or why that is not known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sgl_diffusion_accel.loop.conversions import Conversion
from sgl_diffusion_accel.loop.given import Kind

HOW_TO_PLACE = (
    "For a loop of your own type: for t in denoising_steps(scheduler.timesteps, scheduler=scheduler, guidance=scale): "
    "and inside it, around each call: with branch('cond'): or with branch('uncond'):"
)


@dataclass(slots=True)  # not frozen, which would take most of its making
class LoopCall:
    """Where one transformer call is.

    Attributes:
        loop: The object that stands for the loop, the same one at all its calls and another one for each run: the
            run's timesteps, or the loop of one's own.
        total: Number of denoising steps.
        step: Index of the step.
        branch: `"cond"`, `"uncond"`, or whatever name was set.
        timesteps: The timesteps of this run, one a step, `[S]`; None where the loop does not tell them.
        scheduler: What steps the latents, if it is known.
        owner: An object that lives exactly as long as the run (its progress bar), or None.
        passed: The tensors that are passed, where the name is nobody's word: the conditioning among them is the same at
            every step, and tells branches apart.
        guidance: The scale with which the branches are combined, None where nothing tells.
        boundary: The timestep below which a second transformer takes over, None if there is none.
        switches: The control that has an effect at this step.
        is_published: Whether the loop is code of diffusers itself, of which is known how it combines the branches.
        conversion: What the pipeline makes of the outputs before the scheduler gets them; None if nothing.
    """

    loop: Any
    total: int
    step: int
    branch: str
    timesteps: Tensor | None = None
    scheduler: Any = None
    owner: Any = None
    passed: tuple[Tensor, ...] = ()
    guidance: float | None = None
    boundary: float | None = None
    switches: Kind = frozenset()
    is_published: bool = False
    conversion: Conversion | None = None


@dataclass(frozen=True, slots=True)
class Unplaced:
    """A call that cannot be placed.

    Attributes:
        missing: What is missing, as the end of a sentence.
    """

    missing: str

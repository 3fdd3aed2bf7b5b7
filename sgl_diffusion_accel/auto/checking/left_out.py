"""What `apply_lossless` would leave out of the calls of a transformer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from sgl_diffusion_accel.lossless.apply_lossless import constants_for, owner_of_forward, row_for
from sgl_diffusion_accel.lossless.constants.constant_table import (
    may_have_equal_timesteps,
    may_have_idle_guidance,
)
from sgl_diffusion_accel.lossless.constants.worth import MOST_BYTES
from sgl_diffusion_accel.lossless.padding.table import Row
from sgl_diffusion_accel.targets import Target


@dataclass(frozen=True)
class LeftOut:
    """What cannot matter in the calls of a transformer.

    Attributes:
        what: It, in words; or why there is nothing.
        cuts: Whether there is some in each call that has padding, or a part that is computed once a run.
        may: Whether there may be some in certain calls.
        holds: What is held for that while a run lasts; empty for nothing.
    """

    what: str
    cuts: bool
    may: bool
    holds: str = ""


def left_out_of(pipe: object, target: Target) -> LeftOut:
    """What is left out.

    Args:
        pipe: The pipeline, whose configuration may tell what its calls are like.
        target: The transformer.
    """
    owner = owner_of_forward(target.module)
    found = row_for(owner)
    words = [_cut(found)] if isinstance(found, Row) else []
    constants = constants_for(owner)
    rest, holds = [], ""
    if constants is not None and not constants.why_not(target.module):
        if constants.blocks:
            rest.append("keys and values of the text are computed once a run, where they are worth it")
            holds = f"keys and values of the text, at most {MOST_BYTES:.0%} of the transformer's weights"
        else:
            holds = f"the output of {', '.join(each.part for each in constants.parts)} for each branch"
            words += [f"{each.part} is computed once a run" for each in constants.parts]
    if may_have_equal_timesteps(owner.__name__) and _may_give_each_token_its_timestep(pipe):
        rest.append("one timestep in the place of one for each token, where all are equal")
    if may_have_idle_guidance(target, owner.__name__):
        rest.append("no branch without the prompt where guidance_scale_2=1")
    nothing = "" if isinstance(found, Row) else f"its padding is left alone: it {found}".replace("it it ", "it ")
    what = "; ".join(each for each in (*words, *rest, nothing) if each)
    return LeftOut(what, bool(words), bool(rest), holds)


def _cut(row: Row) -> str:
    tokens = ", ".join(name for stream in row.streams for name in stream.tokens)
    marks = ", ".join(dict.fromkeys(stream.mark for stream in row.streams))
    return f"padding of {tokens} is cut by {marks}, where a call gives it; a mask that hides nothing is left out"


def _may_give_each_token_its_timestep(pipe: object) -> bool:
    """Wan2.2-TI2V-5B's pipeline does; of a transformer by itself it is not known."""
    if isinstance(pipe, nn.Module):
        return True
    config: Any = getattr(pipe, "config", {})
    return bool(config.get("expand_timesteps", False))

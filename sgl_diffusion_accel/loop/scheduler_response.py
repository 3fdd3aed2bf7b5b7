"""How a scheduler turns what the transformer says into latents: its response to each output, found by trying.

Nearly every deterministic scheduler of diffusers is linear: the latents before step s are `Σ_j C[s, j] · output_j` plus
a part that comes from the starting noise. The weights C are found by running a copy of the scheduler on numbers instead
of pictures, so that they hold for Euler, Heun, UniPC, DPM-Solver and DDIM alike.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sgl_diffusion_accel.loop.conversions import Conversion
from sgl_diffusion_accel.slots import SLOT, original_class

logger = logging.getLogger(__name__)

Response = npt.NDArray[np.float64]
"""`[S + 1, S]`: weight of the output at each step in the latents before each step, and in the final ones."""

_IMPULSES = (1e-3, 1e3)  # a response that depends on the size is none: the scheduler clips
_NOISE = 1e-6  # what may come of nothing, or differ between the impulses, relative to the impulse and the response

_ROUNDING = 1e-9  # what is left by rounding of an output that is gone, relative to its largest weight
_FEW = 4

_FRESH: dict[str, Any] = {
    "_step_index": None,
    "lower_order_nums": 0,
    "this_order": 0,
    "last_sample": None,
    "counter": 0,
    "cur_model_output": 0,
    "cur_sample": None,
    "ets": [],
    "dt": None,
    "sample": None,
    "prev_derivative": None,
}
"""What schedulers remember of a run, as it is before the first step."""


def response_of(
    scheduler: Any, total: int, first: int | None = None, conversion: Conversion | None = None
) -> Response | None:
    """Finds the response of a scheduler to the transformer's outputs in a run.

    Args:
        scheduler: With the timesteps of the run set. It is not changed, nor is any random state.
        total: Denoising steps of the run, S: all that are set, or the last of them where a run begins in the middle.
        first: Which of those that are set the run begins with, where it is known: a run may also end early.
        conversion: What the pipeline makes of the outputs before the scheduler gets them; None if nothing.

    Returns:
        The response `[S + 1, S]`; None for a scheduler that adds noise of its own, is not linear, or takes more than
        output, timestep and sample.
    """
    try:
        # A scheduler that adds noise draws random numbers; the user's must stay. The copy is on the host.
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            small, large = (
                _respond(_fresh_copy(scheduler), total, impulse, first, conversion) for impulse in _IMPULSES
            )
    except Exception as error:  # a scheduler is code of others, which may do anything
        logger.debug("%s tells no response: %s", type(scheduler).__name__, error)
        return None
    if small is None or large is None or np.abs(small - large).max() > 1e3 * _NOISE * np.abs(small).max():
        return None
    # Exactly 0, and not by rounding: weight 0 marks an output that only leads to a midpoint (`passing_influence`), and
    # nothing may be divided by what is left of it (`correct`).
    small[np.abs(small) < _ROUNDING * np.abs(small).max(0)] = 0.0
    return small


def passing_influence(response: Response) -> npt.NDArray[np.float64]:
    """How strongly an output reaches the final latents that has no weight in them, and yet in latents on the way.

    Methods with midpoints have such outputs (KDPM2): the first one of a step leads to the midpoint, and is forgotten
    when the second one has been computed there. What is wrong with it puts the midpoint off, and so the answer that is
    given there: by as much as the latents are off, relative to what is left of the run.

    Args:
        response: `[S + 1, S]`.

    Returns:
        max over later steps t of |C[t, s]| / left_t · |C[S, t]|, relative to the whole move, `[S]`; 0 for outputs that
        have a weight of their own.
    """
    sizes = np.abs(response)
    share = sizes[-1] / sizes[-1].sum()
    left = np.maximum(np.cumsum(share[::-1])[::-1], 1e-9)
    passing = (sizes[:-1] / sizes[-1].sum() * (share / left)[:, None]).max(0)
    return np.where(sizes[-1] == 0, passing, 0.0)


def left_at(final: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Share of a run that is left at each step, from 1 down; σ for Euler's method on flow matching. `[S]`.

    Args:
        final: Weight of each step's output in the final latents, `[S]`.
    """
    sizes = np.abs(final)
    left: npt.NDArray[np.float64] = np.cumsum(sizes[::-1])[::-1] / sizes.sum()
    return left


def share_of_schedule(scheduler: Any, first: int | None) -> float:
    """Which share of a whole schedule is left where a run begins, from 1 down; 1 where that is not known.

    Args:
        scheduler: With the timesteps of the whole schedule set.
        first: Which of them the run begins with.
    """
    if not first:
        return 1.0
    response = response_of(scheduler, len(scheduler.timesteps), 0)
    return 1.0 if response is None else float(left_at(response[-1])[first])


def adds_noise(scheduler: Any) -> bool:
    """Whether a scheduler surely adds noise of its own, as its last steps show; before a run, too."""
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            twin = _fresh_copy(scheduler)
            if len(twin.timesteps) > _FEW:
                twin.timesteps = twin.timesteps[:-1]  # before a run some have no noise level behind the last step
            steps = min(_FEW, len(twin.timesteps))
            return bool(np.abs(_tried(twin, steps, 1.0)[:, steps]).max() > _NOISE)
    except Exception:  # as above
        return False


def euler(sigmas: list[float]) -> Response:
    """The response of Euler's method on a schedule of noise levels, the last of them the final one; `[S + 1, S]`."""
    widths = np.diff(np.asarray(sigmas, dtype=np.float64))
    return np.tril(np.broadcast_to(widths, (len(widths) + 1, len(widths))), -1)


def _fresh_copy(scheduler: Any) -> Any:
    """A copy as it is before the first step, with its tensors where numbers are quick."""
    twin: Any = object.__new__(original_class(scheduler))
    for name, value in vars(scheduler).items():
        if name in ("step", SLOT):  # somebody watches the scheduler, but not its twin
            continue
        if isinstance(value, Tensor):
            value = value.detach().to("cpu", copy=True)
        elif isinstance(value, list):
            # A list of tensors is what a multistep method remembers of the run so far: emptied, a scheduler in mid-run
            # gives the response of a fresh one.
            is_memory = any(isinstance(each, Tensor) for each in value)
            value = [None] * len(value) if is_memory else list(value)
        vars(twin)[name] = value
    for name, start in _FRESH.items():
        if name in vars(twin):
            vars(twin)[name] = list(start) if isinstance(start, list) else start
    return twin


def _respond(
    twin: Any, total: int, impulse: float, first: int | None, conversion: Conversion | None
) -> Response | None:
    if not 1 <= total <= len(twin.timesteps):
        return None
    response = _tried(twin, total, impulse, first, conversion)
    weights, noise = response[:, :total], response[:, total]
    is_sound = np.isfinite(response).all() and np.abs(noise).max() <= _NOISE and np.abs(weights[-1]).max() > 0
    return weights if is_sound else None


def _tried(
    twin: Any, total: int, impulse: float, first: int | None = None, conversion: Conversion | None = None
) -> Response:
    # One channel for each step's impulse, and one that stays empty: what appears there is the scheduler's own noise.
    sample = torch.zeros(1, total + 1, 1, 1, dtype=torch.float64)
    before = [sample]
    first = len(twin.timesteps) - total if first is None else first
    for step, timestep in enumerate(twin.timesteps[first : first + total]):
        output = torch.zeros_like(sample)
        output[0, step] = impulse
        if conversion is not None:
            output = conversion(output, sample, twin, first + step)
        sample = twin.step(output, timestep, sample, return_dict=False)[0].double()
        before.append(sample)
    response: Response = torch.stack(before)[:, 0, :, 0, 0].numpy() / impulse
    return response


def looks_back(response: Response) -> bool:
    """Whether two outputs are weighed otherwise into the next latents than into the final ones, as by UniPC.

    Args:
        response: `[S + 1, S]`; see `response_of`.
    """
    final, rows = response[-1], response[2:]
    one, other = np.diagonal(rows), np.diagonal(rows, 1)  # of each output and the one after it, after both
    weighed = (final[:-1] != 0) & (final[1:] != 0)  # midpoints have no weight in the end
    return not np.allclose((one * final[1:])[weighed], (other * final[:-1])[weighed], rtol=1e-3, atol=1e-12)

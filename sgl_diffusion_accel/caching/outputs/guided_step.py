"""Sees what the scheduler is given after a computed call: in one batch of both branches, how guidance combines them.

Where cond and uncond are two calls, their names tell. One batch that holds both says nothing of it, and to the cache it
is one call of one branch. What it is made into shows at the scheduler's next step.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sgl_diffusion_accel.caching.parts.guided_parts import combined_sums, number_of_samples, parts_of
from sgl_diffusion_accel.caching.parts.output_tensors import Tensors
from sgl_diffusion_accel.caching.parts.prediction_error import PredictionError
from sgl_diffusion_accel.shadow import stand_before

logger = logging.getLogger(__name__)


def may_hold_parts(output: Tensors) -> bool:
    """Whether the batch of an output is large enough for two parts."""
    return number_of_samples(output) >= 2


class GuidedStep:
    """Stands in front of a scheduler's step from a computed call until the step is taken, and no longer.

    Args:
        error: Has taken the error of the call as that of one branch. It is replaced where the call turns out to hold
            several parts.
        predicted: What was predicted.
        computed: What was computed.
        given: What the caller got: `computed`, or what it was corrected to.

    Attributes:
        is_whole: Whether the scheduler was given as many samples as the batch has.
    """

    only_enters = True
    is_watching = True

    def __init__(self, error: PredictionError, predicted: Tensors, computed: Tensors, given: Tensors) -> None:
        self.is_whole = False
        self._error = error
        # A correction is the caller's, who may write over it.
        own = given if given is computed else tuple(tensor.detach().clone() for tensor in given)
        self._tensors: tuple[Tensors, Tensors, Tensors] | None = (predicted, computed, own)
        self._beside: list[Tensors] = []
        self._undo: Callable[[], None] | None = None

    def beside(self, output: Tensors) -> None:
        """Takes what another call of the step has returned, which guidance may combine as well.

        It is always computed, and so never wrong.
        """
        if self._tensors is not None:
            self._beside.append(tuple(tensor.detach().clone() for tensor in output))

    def nbytes(self) -> int:
        """Bytes of what is held beside the computed outputs, which the run keeps."""
        predicted, computed, given = self._tensors or ((), (), ())
        own = () if given is computed else given
        held = [tensor for each in (predicted, own, *self._beside) for tensor in each]
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    def wait(self, scheduler: Any) -> None:
        """Waits for the scheduler's next step. One that lets nobody stand before it is not waited for."""
        try:
            undo = stand_before(scheduler, "step", f"guided step {id(self):x}", self)
        except (AttributeError, TypeError) as error:  # it is code of others: without attributes, or not of Python
            logger.debug("%s cannot be watched: %s", type(scheduler).__name__, error)
            self.close()
            return
        # Weak: a run lasts no longer than its timesteps, which the scheduler holds.
        known = weakref.ref(scheduler)

        def take_away() -> None:
            owner = known()
            if owner is not None:
                undo(owner)

        self._undo = take_away

    def enter(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Sees the step."""
        tensors, beside = self._tensors, self._beside
        self.close()
        target = args[0] if args else kwargs.get("model_output")
        if tensors is None or not isinstance(target, Tensor) or not target.ndim:
            return
        predicted, computed, given = tensors
        self.is_whole = len(target) == number_of_samples(computed)
        guessed, found = parts_of(predicted, target), parts_of(computed, target)
        made = found if given is computed else parts_of(given, target)
        if made is None or guessed is None or found is None:
            return
        sure = [part for each in beside for part in parts_of(each, target, fewest=1) or ()]
        wrong = [guess - part for guess, part in zip(guessed, found, strict=True)] + [torch.zeros_like(p) for p in sure]
        corrected = None if made is found else [*found, *sure]
        self._error.combine(*combined_sums(target, [*made, *sure], wrong, corrected))

    def leave(self, _: Any, token: None, output: Any) -> Any:  # noqa: ARG002
        """Hands on what the step gave."""
        return output

    def fail(self, _: Any, token: None) -> None:
        """Nothing: the error goes on to the caller."""

    def close(self) -> None:
        """Goes away, whether the step has come or not. Harmless when repeated."""
        undo, self._undo, self._tensors, self._beside = self._undo, None, None, []
        if undo is not None:
            undo()

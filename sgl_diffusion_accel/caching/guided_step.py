"""Sees what the scheduler is given after a computed call: in one batch of both branches, how guidance combines them.

Where cond and uncond are two calls, their names tell. One batch that holds both says nothing of it, and to a cache it
is one call of one branch. What it is made into shows at the scheduler's next step.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sgl_diffusion_accel.caching.parts.guided_parts import combined_squares, number_of_samples, parts_of, weights_of
from sgl_diffusion_accel.caching.parts.output_tensors import Tensors
from sgl_diffusion_accel.caching.parts.prediction_error import PredictionError
from sgl_diffusion_accel.shadow import stand_before

logger = logging.getLogger(__name__)

Tell = Callable[[Sequence[Tensor], Sequence[Tensor], Tensor], None]
"""Is told the parts of a batch as computed, their weights, and whether the scheduler was given what is made of them."""


class GuidedStep:
    """Stands in front of a scheduler's step from a computed call until the step is taken, and no longer.

    Args:
        error: Has taken the error of the call as that of one branch. It is replaced where the call turns out to hold
            several parts.
        given: What the pipeline got, the tensors of the transformer's output.
        predicted: What was predicted; nothing where there is no prediction yet.
        computed: What was computed, the same tensors.
        are_outputs: Whether these are of the form of the output; else they are residuals, each of the output's batch.
        tell: Is told what was found of the batch; None where nobody asks.

    Attributes:
        is_whole: Whether the scheduler was given as many samples as the batch has.
    """

    only_enters = True
    is_watching = True

    def __init__(
        self,
        error: PredictionError,
        given: Tensors,
        predicted: Tensors,
        computed: Tensors,
        are_outputs: bool = True,
        tell: Tell | None = None,
    ) -> None:
        self.is_whole = False
        self._are_outputs = are_outputs
        self._error = error
        self._tell = tell
        self._tensors: tuple[Tensors, Tensors, Tensors] | None = (given, predicted, computed)
        self._beside: list[Tensors] = []
        self._undo: Callable[[], None] | None = None

    def beside(self, output: Tensors) -> None:
        """Takes what another call of the step has returned, which guidance may combine as well.

        It is always computed, and so never wrong.
        """
        if self._tensors is not None:
            self._beside.append(tuple(tensor.detach().clone() for tensor in output))

    def nbytes(self) -> int:
        """Bytes of what is held beside the computed tensors, which others keep."""
        given, predicted, computed = self._tensors or ((), (), ())
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
        given, predicted, computed = tensors
        self.is_whole = len(target) == number_of_samples(given)
        parts = parts_of(given, target)
        if parts is None:
            return
        sure = [part for each in beside for part in parts_of(each, target, fewest=1) or ()]
        weights, fits = weights_of(target, [*parts, *sure])
        if self._tell is not None and not sure:
            self._tell(parts_of(computed, target) or parts, weights, fits)
        pairs = zip(*(self._parts(each, target, len(parts)) for each in (predicted, computed)), strict=True)
        sums = []
        for guessed, found in pairs if predicted else ():
            if {len(part) for part in found} != {len(target)}:  # rows of a picture as samples of their own
                return
            wrong = [guess - part for guess, part in zip(guessed, found, strict=True)]
            sums.append(torch.stack([combined_squares(weights, wrong), combined_squares(weights, [*found, *sure])]))
        if sums:
            self._error.combine(torch.stack([each.to(target.device) for each in sums]).sum(0), fits)

    def _parts(self, tensors: Tensors, target: Tensor, count: int) -> list[Tensors]:
        if not self._are_outputs:
            return [tensor.flatten(1).chunk(count) for tensor in tensors]
        found = parts_of(tensors, target)
        return [] if found is None else [found]

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

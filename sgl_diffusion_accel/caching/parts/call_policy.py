"""Policies of whole transformer calls: which are computed, and with which weights the others are made from them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from sgl_diffusion_accel.caching.parts.multistep import Weights
from sgl_diffusion_accel.caching.parts.policies import Policy, Position

DEPTH = 4
"""Computed outputs that are kept of each branch."""


class CallPolicy(Policy):
    """Decides the steps of one run for all its branches together, and predicts and corrects their outputs.

    Prediction and correction are weights on computed outputs, found from the steps alone. Made at the start of a run,
    gone with it.

    Attributes:
        spans_models: Whether outputs of one expert of a model may serve the steps of another.
        remark: What the user should know of the run since it began; None for nothing.
    """

    is_shared: ClassVar[bool] = True
    spans_models: bool = False
    remark: str | None = None

    @abstractmethod
    def weights(self, step: int, nodes: Sequence[int]) -> Weights:
        """Weighs the computed outputs for a step.

        Args:
            step: The step, as decided.
            nodes: Computed steps whose outputs are at hand, newest first; the step itself among them if it is computed.

        Returns:
            Weights of some of the nodes.
        """

    def predicted(self, step: int, nodes: Sequence[int]) -> Weights | None:  # noqa: ARG002
        """Weights of the prediction that a computed step is held against, None for no comparison."""
        return None

    def needs_distance(self, step: int) -> bool:  # noqa: ARG002
        """Whether the policy wants to know how far the branches of guidance are apart at a computed step."""
        return False

    def see_distance(self, step: int, distance: float) -> None:
        """Learns how far they were apart.

        Args:
            step: The computed step.
            distance: ‖c - u‖ / ‖c‖.
        """

    def turn(self, position: Position, is_computed: bool) -> bool:  # noqa: ARG002
        """What the model is given is of another kind from a step on: control that begins, an input that appears.

        Args:
            position: Where the step is.
            is_computed: Whether it was decided to be computed.

        Returns:
            Whether nothing before it is of use; then it will be computed.
        """
        self.restart(position)
        return True

    @abstractmethod
    def needs_later(self, step: int) -> bool:
        """Whether the output of a computed step may be used at a later one."""

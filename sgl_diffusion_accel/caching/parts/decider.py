"""A policy at work: what it has decided so far is known, and it learns how good its predictions were."""

from __future__ import annotations

from sgl_diffusion_accel.caching.parts.output_tensors import Tensors
from sgl_diffusion_accel.caching.parts.policies import Change, Decision, Policy, Position, Tally
from sgl_diffusion_accel.caching.parts.prediction_error import PredictionError
from sgl_diffusion_accel.caching.parts.signals import Reduce
from sgl_diffusion_accel.errors import ConfigError, ConfigTypeError


class Decider:
    """A policy of a block cache on one branch of a run, or on all of them, with the errors of its predictions.

    The errors of the branches of a step are combined as guidance combines the branches, and shown to the policy before
    the next step is decided: only then is the device asked for their value.

    Args:
        policy: The policy.

    Attributes:
        error: That of the step so far.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.error = PredictionError()
        self._reduce: Reduce | None = None
        self._step = -1  # at which the errors were made

    def nbytes(self) -> int:
        """Bytes of the errors that wait for another branch."""
        return self.error.nbytes()

    def decide(self, position: Position, tally: Tally, change: Change) -> Decision:
        """What the policy decides, once it has seen the errors of the step before."""
        # At the first branch of the next step the error is complete, with all branches of the step before.
        if self._step != position.step:
            error = self.error.take(self._reduce)
            if error is not None:
                self.policy.observe(self._step, error)
        policy = self.policy
        decision = policy.decide(position, tally, change if policy.needs_signal else self._unannounced)
        if type(decision) is not Decision or type(decision.compute) is not bool:
            raise ConfigTypeError(
                f"{type(policy).__name__}.decide gave {decision!r}; allowed: a Decision, such as Decision(True, 'why')."
            )
        return decision

    def _unannounced(self) -> float:
        """The change of a signal that nobody takes, since the policy does not say that it may ask."""
        name = type(self.policy).__name__
        raise ConfigError(f"{name} asks for the change of a signal and does not say so. Give it: needs_signal = True")

    def restart(self, position: Position) -> None:
        """Tells the policy of a branch of which nothing is known: what was seen before is of no use."""
        self.error.forget()
        self.policy.restart(position)

    def compare(
        self,
        step: int,
        branch: str,
        predicted: Tensors,
        computed: Tensors,
        guidance: float | None,
        reduce: Reduce | None,
    ) -> None:
        """Takes what one branch would have been given at a computed step, beside what was computed.

        Args:
            step: The step.
            branch: Name of the branch.
            predicted: Residuals of the picture's stream that the predictor gives, one a block list, `[B, T, C]`.
            computed: Those that were computed, in the same order.
            guidance: The scale with which the pipeline combines the branches, None where it is not known.
            reduce: Adds up over devices, where each sees a part of the tokens; None where this one sees all.
        """
        self._step, self._reduce = step, reduce
        self.error.add(branch, predicted, computed, guidance)

    def forget(self) -> None:
        """Lets go of all tensors: a call failed."""
        self.error.forget()

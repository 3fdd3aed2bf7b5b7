"""One run under a cache of whole transformer calls: its computed outputs, and what is made of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from sgl_diffusion_accel.caching.guided_step import GuidedStep
from sgl_diffusion_accel.caching.outputs.branch_distance import BranchDistance, distance_of
from sgl_diffusion_accel.caching.parts.call_policy import DEPTH, CallPolicy
from sgl_diffusion_accel.caching.parts.guided_parts import may_hold_parts
from sgl_diffusion_accel.caching.parts.multistep import Weights
from sgl_diffusion_accel.caching.parts.output_tensors import Tensors, combine, take_apart
from sgl_diffusion_accel.caching.parts.policies import Decision, Position, Tally
from sgl_diffusion_accel.caching.parts.prediction_error import PredictionError
from sgl_diffusion_accel.loop.given import Kind, Latents
from sgl_diffusion_accel.loop.runs import Kept
from sgl_diffusion_accel.loop.session import Where


@dataclass
class _Branch:
    """The computed outputs of one branch, by step, and how an output is put together."""

    outputs: dict[int, Tensors] = field(default_factory=dict)
    form: Callable[[Sequence[Tensor]], Any] = tuple

    def forget_unlike(self, tensors: Tensors) -> None:
        """Starts anew for outputs of another form: guidance that ends may leave fewer tensors in a list."""
        shapes = [tensor.shape for tensor in tensors]
        if any([tensor.shape for tensor in each] != shapes for each in self.outputs.values()):
            self.outputs.clear()

    def has(self, nodes: Sequence[int]) -> bool:
        return all(node in self.outputs for node in nodes)


class OutputRun(Kept):
    """What is kept of a run while it lasts: the last outputs of each branch, which are as large as the latents.

    Args:
        policy: Decides its steps.
    """

    def __init__(self, policy: CallPolicy) -> None:
        self._policy = policy
        self._branches: dict[str, _Branch] = {}
        self._nodes: list[int] = []
        self._step = -1
        self._component = ""
        self._latents: Latents | None = None
        self._tally = Tally()
        self._given: dict[str, Kind] = {}
        self._has_turned = False
        self._is_unnamed = False
        self._decision = Decision(True, "first step")
        self._weights: Weights | None = None
        self._error = PredictionError(ends_alike=True)
        self._distance = BranchDistance()
        self._guided: GuidedStep | None = None

    @property
    def remark(self) -> str | None:
        """What the user should know of the run so far."""
        return self._policy.remark or (_UNNAMED if self._is_unnamed else None)

    def nbytes(self) -> int:
        """Bytes of the outputs that are kept."""
        kept = [tensor for branch in self._branches.values() for each in branch.outputs.values() for tensor in each]
        waiting = self._guided.nbytes() if self._guided is not None else 0
        return self._error.nbytes() + waiting + sum(tensor.numel() * tensor.element_size() for tensor in kept)

    def decide(self, where: Where, component: str) -> Decision:
        """Decides a transformer call; all branches of a step share one decision.

        Args:
            where: Where the call is.
            component: Which transformer is called; one name for those that run at the same steps.
        """
        branch, given = where.branch, where.run.given
        turns = self._given.setdefault(branch, given) != given
        self._given[branch] = given
        if where.step != self._step:
            self._has_turned = turns
            self._begin(Position(where.step, where.run.total, where.step), component, where.latents)
        # The step was decided by the branches before, whose inputs are as they were. This one is computed until it can
        # be predicted.
        elif turns and not self._has_turned and branch in self._branches:
            self._branches[branch].outputs.clear()
        if self._decision.compute:
            return self._decision
        # A branch that came late, or was away for some steps, lacks outputs that the weights are for.
        if not self._branches.setdefault(branch, _Branch()).has(list(self._weights or ())):
            return Decision(True, "nothing to predict from")
        return self._decision

    def _begin(self, position: Position, component: str, latents: Latents | None) -> None:
        policy, step = self._policy, position.step
        self.close()
        # Only now: all branches of the step before have come, and the device is asked once.
        error, squares = self._error.take_with(self._distance.squares())
        if error is not None:
            policy.observe(self._step, error)
        distance = distance_of(squares)
        if distance is not None:
            policy.see_distance(self._step, distance)
        is_new = latents != self._latents or (component != self._component and not policy.spans_models)
        self._decision = policy.decide(position, self._tally, _no_change)
        if is_new:
            self._guided = None
        if is_new or not self._nodes:
            if self._nodes:
                policy.restart(position)
            if not self._decision.compute or self._nodes:
                self._decision = Decision(True, "another model or shape" if self._nodes else "first step")
            self._nodes.clear()
            self._branches.clear()
        elif self._has_turned and policy.turn(position, self._decision.compute):
            self._decision = Decision(True, "inputs changed")
            self._nodes.clear()
            self._branches.clear()
        self._tally = self._tally.after(self._decision)
        self._step, self._component, self._latents = step, component, latents
        if self._decision.compute:
            self._nodes = [step, *self._nodes][:DEPTH]
        self._weights = policy.weights(step, self._nodes)
        self._expected = policy.predicted(step, self._nodes) if self._decision.compute else None

    def skip(self, branch: str) -> Any:
        """What a skipped call returns."""
        kept = self._branches[branch]
        return kept.form(combine([(weight, kept.outputs[node]) for node, weight in (self._weights or {}).items()]))

    def end(self, branch: str) -> None:
        """Lets a branch go after its last step."""
        self._branches.pop(branch, None)

    def beside(self, output: Any) -> None:
        """Learns what a call of the present step returned that is never predicted."""
        if self._guided is not None:
            self._guided.beside(take_apart(output)[0])

    def close(self) -> None:
        """Waits for no step of the scheduler any more."""
        if self._guided is not None:
            self._guided.close()

    def computed(self, branch: str, output: Any, guidance: float | None, scheduler: Any = None) -> Any:
        """Keeps what a computed call has returned, and corrects it by what was skipped before.

        Args:
            branch: The branch.
            output: What the transformer returned.
            guidance: The scale with which the pipeline will combine the branches, where it is known.
            scheduler: What will step the latents, where it is known.

        Returns:
            What the caller gets: `output` itself if nothing was skipped before.
        """
        self.close()  # of the step's first call, which has turned out not to be the only one
        tensors, form = take_apart(output)
        # Where nothing is skipped before or after, the output goes through untouched: no copy, and bitwise equal.
        if not self._policy.needs_later(self._step) and self._weights == {self._step: 1.0}:
            self._branches.pop(branch, None)
            return output
        kept = self._branches.setdefault(branch, _Branch())
        kept.forget_unlike(tensors)
        own = tuple(tensor.detach().clone() for tensor in tensors)  # the caller may write into what it gets
        kept.outputs[self._step] = own
        kept.form = form
        given, weights = own, self._weights or {}
        if self._decision.compute and len(weights) > 1 and kept.has(list(weights)):
            given = combine([(weight, kept.outputs[node]) for node, weight in weights.items()])
            output = form(given)
        guess: Tensors = ()
        if self._expected is not None and self._policy.needs_error and kept.has(list(self._expected)):
            guess = combine([(weight, kept.outputs[node]) for node, weight in self._expected.items()])
            self._error.add(branch, guess, own, guidance)
            # A second call of the same name: neither is known as cond or uncond.
            self._is_unnamed |= "#" in branch and (guidance or 0) > 1
        distance = self._distance if self._policy.needs_distance(self._step) else None
        if distance is not None:
            distance.add(branch, own, guidance)
        if scheduler is not None and (guess or distance is not None) and self._may_hold_branches(own):
            # A correction is the caller's, who may write over it.
            kept_given = own if given is own else tuple(tensor.clone() for tensor in given)
            tell = None if distance is None else distance.meet
            self._guided = GuidedStep(self._error, kept_given, guess, own, tell=tell)
            self._guided.wait(scheduler)
        keeps = self._policy.needs_later(self._step)
        kept.outputs = {node: each for node, each in kept.outputs.items() if keeps and node in self._nodes}
        return output

    def _may_hold_branches(self, own: Tensors) -> bool:
        """Whether a call may hold all that guidance combines: no other one comes, and its batch is no whole one."""
        is_alone = len(self._branches) == 1 and self._policy.needs_later(self._step)
        is_whole = self._guided is not None and self._guided.is_whole
        return is_alone and not is_whole and may_hold_parts(own)


_UNNAMED = (
    "two calls of a step have no names, so that their errors are counted without guidance. In a loop of your own type: "
    'with branch("cond"): … and with branch("uncond"): …'
)


def _no_change() -> float:
    """The change of a signal that nobody takes: a whole call shows none before it is computed."""
    return math.inf

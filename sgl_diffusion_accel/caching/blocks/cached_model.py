"""A transformer under a cache: its parts, and what is kept of each branch of a run."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from sgl_diffusion_accel.caching.blocks.entry import Entry
from sgl_diffusion_accel.caching.blocks.layout import Layout, find_block_lists
from sgl_diffusion_accel.caching.blocks.wiring import Form, Wiring, passing
from sgl_diffusion_accel.caching.guided_step import GuidedStep
from sgl_diffusion_accel.caching.parts.decider import Decider
from sgl_diffusion_accel.caching.parts.guided_parts import may_hold_parts
from sgl_diffusion_accel.caching.parts.history import History
from sgl_diffusion_accel.caching.parts.output_tensors import Tensors
from sgl_diffusion_accel.caching.parts.policies import Policy, Tally
from sgl_diffusion_accel.caching.parts.predictors import Predictor
from sgl_diffusion_accel.caching.parts.signals import Signal
from sgl_diffusion_accel.caching.run_log import RunLog
from sgl_diffusion_accel.errors import ConfigError
from sgl_diffusion_accel.loop.host_copy import HostCopy
from sgl_diffusion_accel.loop.runs import Kept, Run
from sgl_diffusion_accel.loop.session import Where
from sgl_diffusion_accel.slots import Detour
from sgl_diffusion_accel.targets import expert_of, model_class
from sgl_diffusion_accel.validate import of_type

Spacing = Literal["step", "sigma"]

MakePolicy = Callable[[Run, str], Policy]
"""Makes or chooses what decides on a branch of a run: (run, name of the branch) to policy."""


class Recorder(Protocol):
    """Sees what a transformer does in uncached runs; calls are told by the number of the run, branch and step."""

    def saw_output(self, run: int, branch: str, step: int, output: Any) -> None:
        """Sees what the transformer has returned."""

    def saw_residuals(self, run: int, branch: str, step: int, residuals: Sequence[Tensor]) -> None:
        """Sees what the blocks have added to the hidden states, one tensor a block list, where it was kept."""


@dataclass(frozen=True)
class Parts:
    """The exchangeable parts of a cache on one transformer.

    Attributes:
        layout: The span that is skipped.
        policy: Decides: one policy for all runs and branches, or what makes them.
        predictor: Supplies what the skipped blocks would have added.
        signal: What the policy's changes are measured on; None for a policy that needs none.
        spacing: The predictor's clock: steps, or the scheduler's sigmas.
        settling: Steps at the start of a run whose residuals are not held against the ones before them, for a slope.
        recorder: Sees each call; None where nothing is recorded.
    """

    layout: Layout
    policy: Policy | MakePolicy
    predictor: Predictor
    signal: Signal | None = None
    spacing: Spacing = "step"
    settling: int = 0
    recorder: Recorder | None = None

    def policy_of(self, run: Run, branch: str) -> Policy:
        """What decides on a branch of a run."""
        if isinstance(self.policy, Policy):
            return self.policy
        made = self.policy(run, branch)
        return of_type("what makes the policy of a run", made, Policy, "a function that returns a Policy")  # type: ignore[no-any-return]


@dataclass
class Branch:
    """What is kept of one branch while its run lasts.

    Attributes:
        seen: Steps so far.
        recorded: Steps whose residuals have been put into the histories.
        tally: What was decided so far.
        decider: Decides; None until the first step.
        signal: The signal that the next change is measured from.
        signature: Shapes, dtypes and devices of what the span takes.
        histories: Residuals, by block list.
        wirings: Which output of a block feeds which argument, by block list.
        forms: How the blocks put their output together, by (block list, whether it is the span's last block).
        detours: What skipped blocks in the middle of a span answer, by block list.
    """

    seen: int = 0
    recorded: int = 0
    decider: Decider | None = None
    tally: Tally = field(default_factory=Tally)
    signal: Tensor | None = None
    signature: tuple[Any, ...] = ()
    histories: dict[int, History] = field(default_factory=dict)
    wirings: dict[int, Wiring] = field(default_factory=dict)
    forms: dict[tuple[int, bool], Form] = field(default_factory=dict)
    detours: dict[int, Callable[[tuple[Any, ...], dict[str, Any]], Any]] = field(default_factory=dict)

    def forget(self, signature: tuple[Any, ...] = ()) -> None:
        """Starts over, for inputs of another shape, dtype or device."""
        # The limit on skipped steps is the run's, and holds over a change of the batch. The wiring goes too: a stream
        # may end in mid-run.
        self.signature, self.signal, self.tally = signature, None, Tally(cached=self.tally.cached)
        self.recorded = 0
        self.histories.clear()
        self.wirings.clear()
        self.forms.clear()
        self.detours.clear()

    def passing(self, list_index: int) -> Callable[[tuple[Any, ...], dict[str, Any]], Any]:
        """What the skipped blocks in the middle of a list's span answer."""
        if list_index not in self.detours:
            self.detours[list_index] = passing(self.wirings[list_index], self.forms[list_index, False])
        return self.detours[list_index]

    def nbytes(self) -> int:
        """Bytes of the tensors that are kept."""
        signal = 0 if self.signal is None else self.signal.numel() * self.signal.element_size()
        return signal + sum(history.nbytes() for history in self.histories.values())


@dataclass
class BlockRun(Kept):
    """What is kept of a run while it lasts.

    Attributes:
        branches: By (component, name of the branch).
        shared: The deciders that all branches share (`Policy.is_shared`), by component; those that run at the same
            steps count as one.
        schedules: The changes of a signal that are known for all steps, by component.
        guided: Has waited last for what the scheduler is given; None before the first time.
    """

    branches: dict[tuple[str, str], Branch] = field(default_factory=dict)
    shared: dict[str, Decider] = field(default_factory=dict)
    schedules: dict[str, HostCopy] = field(default_factory=dict)
    guided: GuidedStep | None = None

    def nbytes(self) -> int:
        """Bytes of the tensors that are kept."""
        waiting = sum(decider.nbytes() for decider in self.shared.values())
        waiting += self.guided.nbytes() if self.guided is not None else 0
        return waiting + sum(branch.nbytes() for branch in self.branches.values())

    def close(self) -> None:
        """Waits for no step of the scheduler any more."""
        if self.guided is not None:
            self.guided.close()

    def await_step(self, decider: Decider, scheduler: Any, output: Tensors, guesses: Tensors, found: Tensors) -> None:
        """Has the scheduler's next step tell how the parts of a batch are combined, where it may hold several.

        Args:
            decider: Has taken the error of the call.
            scheduler: What will step the latents; None where it is not known.
            output: What the transformer returned.
            guesses: Residuals that were predicted.
            found: Those that were computed.
        """
        is_alone = len({branch for _, branch in self.branches}) == 1
        is_whole = self.guided is not None and self.guided.is_whole
        if guesses and scheduler is not None and is_alone and not is_whole and may_hold_parts(output):
            own = tuple(tensor.detach().clone() for tensor in output)  # the caller may write over it
            self.guided = GuidedStep(decider.error, own, guesses, found, are_outputs=False)
            self.guided.wait(scheduler)

    @classmethod
    def of(cls, run: Run) -> BlockRun:
        """What is kept of a run, or the beginning of it."""
        if not isinstance(run.kept, BlockRun):
            run.kept = cls()
        return run.kept


class CachedModel:
    """A transformer under a cache. It holds no module: a cache must not keep a model alive.

    Args:
        name: The component's name.
        module: The transformer.
        parts: What the cache is made of.

    Attributes:
        writes_inputs: Whether a block was seen to write over its input; then inputs are copied before they are kept.
        detours: The short ways past the skipped blocks of each list's span: past those between its first and its last
            one, and past the last one.
        warned: Whether it has been said that the model runs without its blocks.
        log: What is noted of its calls.
    """

    def __init__(self, name: str, module: nn.Module, parts: Parts) -> None:
        self.name = name
        self.parts = parts
        self.writes_inputs = False
        self.detours = [(Detour(), Detour()) for _ in parts.layout.lists]
        self.warned = False
        self.log = RunLog(name, parts.layout.total, parts.layout.skippable)
        self._class = model_class(module).__name__
        self._parameters = [_parameters(blocks[0]) for blocks in find_block_lists(module).values()]

    def where(self, list_index: int) -> str:
        """Names a block list, for errors."""
        return f"{self._class}.{self.parts.layout.lists[list_index].name}"

    def wiring(self, branch: Branch, list_index: int) -> Wiring:
        """Returns what is known of a list's wiring on a branch."""
        if list_index not in branch.wirings:
            branch.wirings[list_index] = Wiring(self._parameters[list_index], self.where(list_index))
        return branch.wirings[list_index]

    def decider(self, where: Where, kept: BlockRun, branch: Branch) -> Decider:
        """Returns what decides on a branch; at its first step, checks that the policy fits the run.

        Args:
            where: Where the call is.
            kept: What is kept of its run.
            branch: The branch.
        """
        if branch.decider is None:
            expert = expert_of(self.name)
            branch.decider = kept.shared.get(expert) or Decider(self.parts.policy_of(where.run, where.branch))
            policy = branch.decider.policy
            if policy.is_shared:
                kept.shared[expert] = branch.decider
            if policy.needs_signal and self.parts.signal is None:
                raise ConfigError(
                    f"{type(policy).__name__} asks for the change of a signal, and none was given. Type: "
                    "apply_block_cache(pipe, policy, signal=HeadResidual())"
                )
            self.log.tell(where.run, policy.prepare(where.run.total))
        return branch.decider

    def weights(self, times: Sequence[float], time: float) -> Sequence[float]:
        """How the predictor weighs the last computed steps.

        Raises:
            ConfigError: Not one finite number for each: a predictor of the user's own.
        """
        weights = self.parts.predictor.weights(times, time)
        if len(weights) != len(times) or not all(map(math.isfinite, weights)):
            raise ConfigError(
                f"{type(self.parts.predictor).__name__}.weights gave {weights!r} for the computed steps at "
                f"{list(times)}; allowed: one finite number for each, the newest first."
            )
        return weights

    def has_written(self, entry: Entry) -> bool:
        """Whether blocks have written over an input that was kept; from then on inputs are copied."""
        self.writes_inputs |= entry.changed()
        return entry.changed()


def _parameters(block: nn.Module) -> list[str]:
    """Names of a block's parameters, as far as they can be given by position."""
    named = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [name for name, one in inspect.signature(block.forward).parameters.items() if one.kind in named]

"""A transformer under a cache: its parts, and what is kept of each branch of a run."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sgl_diffusion_accel.caching.blocks.entry import Entry
from sgl_diffusion_accel.caching.blocks.layout import Layout, find_block_lists
from sgl_diffusion_accel.caching.blocks.wiring import Form, Wiring, passing
from sgl_diffusion_accel.caching.parts.history import History
from sgl_diffusion_accel.caching.parts.policies import Decision, Policy, Tally
from sgl_diffusion_accel.caching.parts.predictors import Predictor
from sgl_diffusion_accel.caching.parts.signals import Signal, TimeEmbedding
from sgl_diffusion_accel.caching.parts.stats import RunStats
from sgl_diffusion_accel.caching.remarks import Remarks, few_steps_remark
from sgl_diffusion_accel.intercept import Detour
from sgl_diffusion_accel.loop.runs import Kept, Run
from sgl_diffusion_accel.targets import expert_of, model_class

logger = logging.getLogger(__name__)

Spacing = Literal["step", "sigma"]


@dataclass(frozen=True)
class Parts:
    """The exchangeable parts of a cache on one transformer.

    Attributes:
        layout: The span that is skipped.
        policy: Decides.
        predictor: Supplies what the skipped blocks would have added.
        signal: What the policy's changes are measured on; None for a policy that needs none.
        spacing: The predictor's clock: steps, or the scheduler's sigmas.
        observe: Sees each output of the transformer, with the number of the run, the branch and the step.
        observe_residuals: Sees what the blocks have added to the hidden states, one tensor a block list, after each
            step whose residuals are kept; with the same numbers.
        by_run: Makes the policy that all branches of a run share; None where one that remembers nothing does for all.
        by_latents: Chooses the policy of a run by the shape of its latents, `[B, C, (F,) H, W]`, with a word on it for
            the user; None where one policy does for all.
        by_branch: Chooses the policy of a branch by its name; None where one policy does for all.
        settling: Steps at the start of a run whose residuals are not held against the ones before them, for a slope.
    """

    layout: Layout
    policy: Policy
    predictor: Predictor
    signal: Signal | TimeEmbedding | None
    spacing: Spacing = "step"
    observe: Callable[[int, str, int, Any], None] | None = None
    observe_residuals: Callable[[int, str, int, Sequence[Tensor]], None] | None = None
    by_run: Callable[[Run], Policy] | None = None
    by_latents: Callable[[torch.Size], tuple[Policy, str]] | None = None
    by_branch: Callable[[str], Policy] | None = None
    settling: int = 0


@dataclass
class Branch(Kept):
    """What is kept of one branch while its run lasts.

    Attributes:
        seen: Steps so far.
        recorded: Steps whose residuals have been put into the histories.
        tally: What was decided so far.
        policy: Decides; None until the first step.
        signal: The signal that the next change is measured from.
        signature: Shapes, dtypes and devices of what the span takes.
        histories: Residuals, by block list.
        wirings: Which output of a block feeds which argument, by block list.
        forms: How the blocks put their output together, by (block list, whether it is the span's last block).
        detours: What skipped blocks in the middle of a span answer, by block list.
    """

    seen: int = 0
    recorded: int = 0
    policy: Policy | None = None
    tally: Tally = field(default_factory=Tally)
    signal: Tensor | None = None
    signature: tuple[Any, ...] = ()
    histories: dict[int, History] = field(default_factory=dict)
    wirings: dict[int, Wiring] = field(default_factory=dict)
    forms: dict[tuple[int, bool], Form] = field(default_factory=dict)
    detours: dict[int, Callable[[tuple[Any, ...], dict[str, Any]], Any]] = field(default_factory=dict)

    def forget(self, signature: tuple[Any, ...] = ()) -> None:
        """Starts over, for inputs of another shape, dtype or device."""
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
        remarks: What the user is told of its runs.
    """

    def __init__(self, name: str, module: nn.Module, parts: Parts) -> None:
        self.name = name
        self.parts = parts
        self.writes_inputs = False
        self.detours = [(Detour(), Detour()) for _ in parts.layout.lists]
        self.warned = False
        self.remarks = Remarks(name)
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

    def policy(self, run: Run, name: str, branch: Branch, latents: torch.Size | None) -> Policy:
        """Returns what decides on a branch; at its first step, checks that it fits the run.

        Args:
            run: The run.
            name: Of the branch.
            branch: The branch.
            latents: Shape of what the transformer is called with, if it takes a tensor.
        """
        if branch.policy is None:
            chosen = self.parts.policy if self.parts.by_branch is None else self.parts.by_branch(name)
            branch.policy = self._shared(run) or chosen
            if self.parts.by_latents is not None and latents is not None:
                branch.policy, choice = self.parts.by_latents(latents)
                self.remarks.tell(run, choice, logging.INFO)
            remark = branch.policy.prepare(run.total)
            self.remarks.tell(run, remark)
        return branch.policy

    def _shared(self, run: Run) -> Policy | None:
        """The policy that the branches of a run share, made at its first step and let go with it."""
        if self.parts.by_run is None:
            return None
        key = f"policy of {expert_of(self.name)}"
        if key not in run.data:
            run.data[key] = self.parts.by_run(run)
        shared: Policy = run.data[key]
        return shared

    def has_written(self, entry: Entry) -> bool:
        """Whether blocks have written over an input that was kept; from then on inputs are copied."""
        self.writes_inputs |= entry.changed()
        return entry.changed()

    def log(self, run: Run, step: int, branch: str, decision: Decision) -> None:
        """Enters a decision into the statistics of its run."""
        stats: RunStats | None = run.data.get("stats")
        if stats is not None:
            layout = self.parts.layout
            executed = layout.total - (0 if decision.compute else layout.skippable)
            stats.add(branch, step, self.name, decision, executed, layout.total)
        if not decision.compute:
            self.remarks.tell(run, few_steps_remark(run.total))


def _parameters(block: nn.Module) -> list[str]:
    """Names of a block's parameters, as far as they can be given by position."""
    named = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [name for name, one in inspect.signature(block.forward).parameters.items() if one.kind in named]

"""A transformer under a cache: its parts, and what is kept of each branch of a run."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from sgl_diffusion_accel.caching.blocks import Layout, find_block_lists
from sgl_diffusion_accel.caching.history import History
from sgl_diffusion_accel.caching.policies import Decision, Policy, Tally
from sgl_diffusion_accel.caching.predictors import Predictor
from sgl_diffusion_accel.caching.runs import Run
from sgl_diffusion_accel.caching.signals import Signal
from sgl_diffusion_accel.caching.stats import RunStats
from sgl_diffusion_accel.caching.wiring import Wiring

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
    """

    layout: Layout
    policy: Policy
    predictor: Predictor
    signal: Signal | None
    spacing: Spacing = "step"


@dataclass
class Branch:
    """What is kept of one branch while its run lasts.

    Attributes:
        seen: Steps so far.
        recorded: Steps whose residuals have been put into the histories.
        tally: What was decided so far.
        signal: Signal of the last computed step.
        signature: Shapes, dtypes and devices of what the span takes.
        histories: Residuals, by block list.
        wirings: Which output of a block feeds which argument, by block list.
        forms: How the blocks put their output together, by (block list, whether it is the span's last block).
    """

    seen: int = 0
    recorded: int = 0
    tally: Tally = field(default_factory=Tally)
    signal: Tensor | None = None
    signature: tuple[Any, ...] = ()
    histories: dict[int, History] = field(default_factory=dict)
    wirings: dict[int, Wiring] = field(default_factory=dict)
    forms: dict[tuple[int, bool], Callable[[list[Any]], Any]] = field(default_factory=dict)

    def forget(self, signature: tuple[Any, ...] = ()) -> None:
        """Starts over, for inputs of another shape, dtype or device."""
        self.signature, self.signal, self.tally = signature, None, Tally(cached=self.tally.cached)
        self.recorded = 0
        self.histories.clear()
        self.wirings.clear()
        self.forms.clear()

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
        warned: Whether it has been said that the model runs without its blocks.
    """

    def __init__(self, name: str, module: nn.Module, parts: Parts) -> None:
        self.name = name
        self.parts = parts
        self.writes_inputs = False
        self.warned = False
        self._class = type(module).__name__
        self._parameters = [_parameters(blocks[0]) for blocks in find_block_lists(module).values()]

    def where(self, list_index: int) -> str:
        """Names a block list, for errors."""
        return f"{self._class}.{self.parts.layout.lists[list_index].name}"

    def wiring(self, branch: Branch, list_index: int) -> Wiring:
        """Returns what is known of a list's wiring on a branch."""
        if list_index not in branch.wirings:
            branch.wirings[list_index] = Wiring(self._parameters[list_index], self.where(list_index))
        return branch.wirings[list_index]

    def log(self, run: Run, step: int, branch: str, decision: Decision) -> None:
        """Enters a decision into the statistics of its run."""
        stats: RunStats | None = run.data.get("stats")
        if stats is not None:
            layout = self.parts.layout
            executed = layout.total - (0 if decision.compute else layout.skippable)
            stats.add(branch, step, self.name, decision, executed, layout.total)


def _parameters(block: nn.Module) -> list[str]:
    """Names of a block's parameters, as far as they can be given by position."""
    named = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [name for name, one in inspect.signature(block.forward).parameters.items() if one.kind in named]

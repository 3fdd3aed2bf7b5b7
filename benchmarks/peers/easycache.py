"""EasyCache (Zhou et al. 2025, arXiv 2507.02860): what the transformer adds to its input is used again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .loop import Loop, following, replaced

FAMILY = "EasyCache"
_STEPS = 50
"""Steps of the runs for which the warm-up is published."""


@dataclass(frozen=True)
class Setting:
    """One setting; the published one for Wan2.1 is a threshold of 0.05 after 10 of 50 steps.

    Attributes:
        threshold: Accumulated relative change below which a step is skipped.
        warmup: Steps that are computed at the start of a run.
    """

    threshold: float
    warmup: int

    @property
    def name(self) -> str:
        """A short name, such as `threshold .05, after 10`."""
        return f"threshold {self.threshold:g}, after {self.warmup}".replace(" 0.", " .")


def settings(steps: int) -> list[Setting]:
    """Thresholds around the published one, after a tenth and after a fifth of the steps."""
    warmups = [max(2, round(warmup * steps / _STEPS)) for warmup in (5, 10)]
    return [Setting(threshold, warmup) for warmup in warmups for threshold in (0.025, 0.05, 0.1, 0.2)]


@contextlib.contextmanager
def apply(pipe: Any, setting: Setting, steps: int) -> Iterator[None]:
    """Puts EasyCache in front of the pipeline's transformer until the context ends."""
    transformer = pipe.transformer
    with contextlib.ExitStack() as undo:
        loop = undo.enter_context(following(transformer, _Run))
        cache = _Cache(transformer.forward, loop, setting, steps)
        undo.enter_context(replaced(transformer, "forward", cache))
        yield


@dataclass
class _Run:
    """What is known in a run.

    Attributes:
        leader: Branch that decides for all: the first that is called.
        skips: What it has decided for the present step.
        rate: Change of the output over change of the input, k, between the last two computed steps.
        deviation: Relative change of the output that is expected since the last computed step, E.
        latest: Input of the step before, computed or not.
        computed: Input and output of the last computed step.
        added: Output less input of the last computed step of each branch, Δ.
    """

    leader: str | None = None
    skips: bool = False
    rate: float | None = None
    deviation: float = 0.0
    latest: Tensor | None = None
    computed: tuple[Tensor, Tensor] | None = None
    added: dict[str, Tensor] = field(default_factory=dict)


class _Cache:
    """The transformer's forward.

    With ‖·‖ the mean of absolute values, step i the last that was computed and step h the one computed before it:

        k = ‖vᵢ − vₕ‖ / ‖xᵢ − xₕ‖,   Eₜ = Σ k ‖xₙ − xₙ₋₁‖ / ‖vᵢ‖ over n = i+1 … t

    A step with Eₜ below the threshold is skipped, vₜ = xₜ + Δᵢ. The first steps and the last are computed. The
    conditional branch decides for both. So it is in the authors' code; their formulas have the step before i for h, and
    vₙ₋₁ for vᵢ.
    """

    def __init__(self, forward: Callable[..., Any], loop: Loop[_Run], setting: Setting, steps: int) -> None:
        self._forward, self._loop, self._setting, self._steps = forward, loop, setting, steps

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Computes the output, or makes it of the last computed one."""
        run, branch, latents = self._loop.run, self._loop.branch, kwargs["hidden_states"]
        if run.leader is None:
            run.leader = branch
        leads = branch == run.leader
        if leads:
            run.skips = self._decide(run, latents)
        if run.skips and branch in run.added:
            return (latents + run.added[branch],)
        outputs = self._forward(*args, **kwargs)
        run.added[branch] = outputs[0] - latents
        if leads:
            _learn(run, latents, outputs[0])
        return outputs

    def _decide(self, run: _Run, latents: Tensor) -> bool:
        step, latest, run.latest = self._loop.step, run.latest, latents
        is_free = self._setting.warmup <= step < self._steps - 1
        if is_free and latest is not None and run.rate is not None and run.computed is not None:
            run.deviation += run.rate * _size(latents - latest) / _size(run.computed[1])
            if run.deviation < self._setting.threshold:
                return True
        run.deviation = 0.0
        return False


def _learn(run: _Run, latents: Tensor, output: Tensor) -> None:
    if run.computed is not None:
        run.rate = _size(output - run.computed[1]) / _size(latents - run.computed[0])
    run.computed = latents, output


def _size(tensor: Tensor) -> float:
    return float(tensor.abs().mean())

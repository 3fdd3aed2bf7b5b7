"""TaylorSeer as published (Liu et al. 2025, arXiv 2503.06923): every module's output is forecast by a Taylor series.

diffusers has a TaylorSeer too: its lite mode forecasts the transformer's output, its other mode attention alone.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sgl_diffusion_accel.comparing.measures.block_work import blocks_of

from .loop import Loop, following, replaced

FAMILY = "TaylorSeer"
FIRST = 3
"""Steps that are computed at the start of a run, as in the authors' code for FLUX and HunyuanVideo."""

_MODULES: Mapping[str, tuple[Sequence[str], Sequence[str]]] = {
    "WanTransformerBlock": (("attn1", "attn2", "ffn"), ()),
    "QwenImageTransformerBlock": (("attn", "img_mlp", "txt_mlp"), ()),
    "FluxTransformerBlock": (("attn", "ff", "ff_context"), ()),
    "FluxSingleTransformerBlock": (("proj_out",), ("attn", "proj_mlp")),
}
"""By the class of a block: modules whose output is forecast, and modules that nothing but those read."""


@dataclass(frozen=True)
class Setting:
    """One setting.

    Attributes:
        interval: Steps from one computed step to the next after the first ones, N; 1 computes all.
        order: Highest order of the series, O.
    """

    interval: int
    order: int

    @property
    def name(self) -> str:
        """A short name, such as `every 4 steps, order 2`."""
        return f"every {self.interval} steps, order {self.order}"

    def computes(self, step: int) -> bool:
        """Whether a step is computed: the first ones, and each `interval` steps after the last of these."""
        return step < FIRST or (step - FIRST + 1) % self.interval == 0


SETTINGS = tuple(Setting(interval, order) for interval in (3, 4, 5, 6) for order in (1, 2))


@contextlib.contextmanager
def apply(pipe: Any, setting: Setting) -> Iterator[None]:
    """Puts forecasts in the place of the modules of the transformer's blocks until the context ends.

    What is cheap is computed in each step: norms, and modulation by the time embedding.
    """
    with contextlib.ExitStack() as undo:
        loop = undo.enter_context(following(pipe.transformer, dict[tuple[str, int], _Series]))
        for block in blocks_of(pipe.transformer):
            forecast, unread = _MODULES[type(block).__name__]
            for name in (*forecast, *unread):
                order = setting.order if name in forecast else 0
                stand_in = _StandIn(getattr(block, name), loop, setting, order)
                undo.enter_context(replaced(block, name, stand_in))
        yield


@dataclass
class _Series:
    """Outputs of a module at a computed step with their divided differences, a tuple for each order."""

    step: int
    factors: list[tuple[Tensor, ...]]

    def next(self, step: int, outputs: tuple[Tensor, ...], order: int) -> _Series:
        """The series at the next computed step: Δⁱ⁺¹ = (Δⁱ of this step − Δⁱ of the one before) / steps between."""
        factors = [outputs]
        # The authors' code takes no differences before the last of the first steps.
        for before in self.factors[:order] if step >= FIRST - 1 else ():
            distance = step - self.step
            factors.append(tuple((new - old) / distance for new, old in zip(factors[-1], before, strict=True)))
        return _Series(step, factors)

    def at(self, step: int) -> tuple[Tensor, ...]:
        """The forecast k steps after: Σ Δⁱ kⁱ / i!."""
        ahead, found = step - self.step, self.factors[0]
        for order, factors in enumerate(self.factors[1:], 1):
            weight = ahead**order / math.factorial(order)
            found = tuple(value + weight * factor for value, factor in zip(found, factors, strict=True))
        return found


class _StandIn(nn.Module):
    """A module, or the forecast of its output. Hooks on the module itself see nothing where it is not computed."""

    def __init__(
        self, module: nn.Module, loop: Loop[dict[tuple[str, int], _Series]], setting: Setting, order: int
    ) -> None:
        super().__init__()
        self.module = module
        self._loop, self._setting, self._order = loop, setting, order

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        loop, key = self._loop, (self._loop.branch, id(self))
        series = loop.run.get(key)
        if series is None or self._setting.computes(loop.step):
            outputs = self.module(*args, **kwargs)
            values = outputs if isinstance(outputs, tuple) else (outputs,)
            loop.run[key] = series.next(loop.step, values, self._order) if series else _Series(loop.step, [values])
            return outputs
        found = series.at(loop.step)
        return found if len(found) > 1 else found[0]

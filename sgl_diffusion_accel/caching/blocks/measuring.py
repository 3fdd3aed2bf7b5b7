"""Takes the signal of one transformer call, from what its first blocks are given and return."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sgl_diffusion_accel.caching.blocks.cached_model import Branch, CachedModel
from sgl_diffusion_accel.caching.blocks.entry import Entry
from sgl_diffusion_accel.caching.blocks.modulated import modulated_input
from sgl_diffusion_accel.caching.blocks.parallel import local_part, signal_reduction
from sgl_diffusion_accel.caching.blocks.wiring import Call, elements, form_of
from sgl_diffusion_accel.caching.parts.signals import HeadResidual, TimeEmbedding, relative_l1
from sgl_diffusion_accel.errors import UnsupportedModelError
from sgl_diffusion_accel.loop.host_copy import HostCopy
from sgl_diffusion_accel.loop.runs import Run
from sgl_diffusion_accel.targets import unwrap


class Measurement:
    """How much has changed at one transformer call. It is what its signal can look at (`signals.Seen`).

    Args:
        model: The cached transformer.
        module: The transformer itself.
        run: The run that the call belongs to.
        step: Index of the denoising step.
        branch: What is kept of the branch.
        is_needed: Whether a change may be asked for at this step or a later one.
    """

    def __init__(
        self, model: CachedModel, module: nn.Module, run: Run, step: int, branch: Branch, is_needed: bool
    ) -> None:
        self._model, self._module, self._run, self._step, self._branch = model, module, run, step, branch
        self._signal = model.parts.signal if is_needed else None
        self._entry: Entry | None = None
        self._output: Any = None
        self._first: tuple[nn.Module, Call] | None = None
        self._taken: Tensor | None = None
        self._over = False

    def before(self, list_index: int, index: int, block: nn.Module, call: Call) -> None:
        """Sees a block's arguments."""
        if index != 0 or self._over or self._signal is None:
            return
        if isinstance(self._signal, HeadResidual):
            if list_index == 0 and self._model.parts.layout.fn:
                self._entry = Entry(call, self._model.writes_inputs)
        elif self._first is None:
            self._first = (block, call)
            if isinstance(self._signal, TimeEmbedding) and self._branch.seen == 0:
                self._schedule()  # queued on the device before the first step, and read at the second

    def after(self, list_index: int, index: int, output: Any) -> None:
        """Sees what a computed block returned."""
        if self._entry is not None and list_index == 0 and index == self._model.parts.layout.fn - 1:
            self._output = output

    def change(self) -> float:
        """The relative change of the signal; infinity where there is nothing to compare with."""
        if isinstance(self._signal, TimeEmbedding):
            return self._schedule()[self._step] if self._branch.seen else float("inf")
        now, reference = self._take(), self._branch.signal
        if now is None or reference is None:
            return float("inf")
        return relative_l1(now, reference, signal_reduction(self._module))

    def keep(self, computed: bool, is_next: bool) -> None:
        """Keeps the signal as the one that later changes are measured from, if it is.

        Args:
            computed: Whether this step is computed.
            is_next: Whether the change may be asked for at the next step.
        """
        if self._signal is None or isinstance(self._signal, TimeEmbedding):
            return
        if is_next if self._signal.from_previous_step else computed:
            self._branch.signal = self._take()

    def drop(self) -> None:
        """Lets go of all tensors: the decision has been made."""
        self._over = True
        self._entry = self._output = self._first = self._taken = None

    def head(self) -> tuple[Tensor, Tensor] | None:
        """See `signals.Seen`. None where the first blocks have written over their input."""
        if self._entry is None:
            raise UnsupportedModelError(
                f"{self._model.where(0)} is not the first block list that {type(self._module).__name__} runs, so "
                "there is no signal to take from its first blocks. This model can only be cached with a static "
                "mask: steps_mask='late-fast', steps_policy='static', fn_compute_blocks=0."
            )
        if not self._branch.histories:
            form_of(self._output)  # refuses what cannot be put together again
        wiring, parts = self._model.wiring(self._branch, 0), elements(self._output)
        if not wiring.complete:
            wiring.settle(self._entry.call, self._output)
        index = wiring.hidden(parts)
        key = wiring.keys[index]
        if self._model.has_written(self._entry) or key is None:
            return None
        return local_part(wiring.get(self._entry.call, key), parts[index], self._module), parts[index]

    def modulated_input(self) -> Tensor:
        """See `signals.Seen`."""
        if self._first is None:
            raise self._blind()
        return modulated_input(*self._first)

    def _take(self) -> Tensor | None:
        if self._taken is None and self._signal is not None and not isinstance(self._signal, TimeEmbedding):
            self._taken = self._signal.take(self)
        return self._taken

    def _schedule(self) -> HostCopy:
        """The changes at all steps of the run; made once, for all branches."""
        key = f"changes of {self._model.name}"
        made: HostCopy | None = self._run.data.get(key)
        if made is None and self._first is not None and isinstance(self._signal, TimeEmbedding):
            like = next(v for v in (*self._first[1][0], *self._first[1][1].values()) if isinstance(v, Tensor))
            timesteps = torch.as_tensor(self._run.timesteps).to(like.device)
            made = HostCopy(self._signal.changes(unwrap(self._module), timesteps, like.dtype))
            self._run.data[key] = made
        if made is None:
            raise self._blind()
        return made

    def _blind(self) -> UnsupportedModelError:
        return UnsupportedModelError(f"{type(self._module).__name__} has run no block: there is nothing to measure.")

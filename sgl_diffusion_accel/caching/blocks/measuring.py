"""Takes the signal of one transformer call, from what its first blocks are given and return."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sgl_diffusion_accel.caching.blocks.cached_model import BlockRun, Branch, CachedModel
from sgl_diffusion_accel.caching.blocks.entry import Entry
from sgl_diffusion_accel.caching.blocks.modulated import modulated_input
from sgl_diffusion_accel.caching.blocks.parallel import local_part, signal_reduction
from sgl_diffusion_accel.caching.blocks.wiring import Call, elements, form_of
from sgl_diffusion_accel.caching.parts.signals import Changes, Reduce, Seen
from sgl_diffusion_accel.errors import ConfigError, UnsupportedModelError
from sgl_diffusion_accel.loop.host_copy import HostCopy
from sgl_diffusion_accel.loop.session import Where
from sgl_diffusion_accel.targets import unwrap
from sgl_diffusion_accel.validate import of_type


class Measurement(Seen):
    """How much has changed at one transformer call. It is what its signal can look at (`signals.Seen`).

    Args:
        model: The cached transformer.
        module: The transformer itself.
        where: Where the call is.
        kept: What is kept of the run.
        branch: What is kept of the branch.
        is_needed: Whether a change may be asked for at this step or a later one.
    """

    def __init__(
        self, model: CachedModel, module: nn.Module, where: Where, kept: BlockRun, branch: Branch, is_needed: bool
    ) -> None:
        self._model, self._module, self._kept, self._branch = model, module, kept, branch
        self._run, self._step = where.run, where.step
        self._signal = model.parts.signal if is_needed else None
        self._entry: Entry | None = None
        self._output: Any = None
        self._first: tuple[nn.Module, Call] | None = None
        self._taken: Tensor | None = None
        self._over = False

    @property
    def reference(self) -> Tensor | None:
        """The signal that was kept."""
        return self._branch.signal

    @property
    def reduce(self) -> Reduce | None:
        """By the ranks of the transformer."""
        return signal_reduction(self._module)

    def before(self, list_index: int, index: int, block: nn.Module, call: Call) -> None:
        """Sees a block's arguments."""
        if index != 0 or self._over or self._signal is None:
            return
        if self._signal.needs_head:
            if list_index == 0 and self._model.parts.layout.fn:
                self._entry = Entry(call, self._model.writes_inputs)
        # Of whichever list runs first; that need not be the one that is defined first.
        elif self._first is None:
            self._first = (block, call)
            # In front of the first block: what is queued now has arrived by the second step, and nothing waits for it.
            if self._branch.seen == 0:
                self._signal.begin(self)

    def after(self, list_index: int, index: int, output: Any) -> None:
        """Sees what a computed block returned."""
        if self._entry is not None and list_index == 0 and index == self._model.parts.layout.fn - 1:
            self._output = output

    def change(self) -> float:
        """The relative change of the signal; infinity where there is nothing to compare with."""
        return float("inf") if self._signal is None else self._signal.change(self)

    def keep(self, computed: bool, is_next: bool) -> None:
        """Keeps the signal as the one that later changes are measured from, if it is.

        Args:
            computed: Whether this step is computed.
            is_next: Whether the change may be asked for at the next step.
        """
        if self._signal is not None and (is_next if self._signal.from_previous_step else computed):
            self._branch.signal = self.taken()

    def drop(self) -> None:
        """Lets go of all tensors: the decision has been made."""
        self._over = True
        self._entry = self._output = self._first = self._taken = None

    def head(self) -> tuple[Tensor, Tensor] | None:
        """See `signals.Seen`. None where the first blocks have written over their input."""
        if self._signal is not None and not self._signal.needs_head:
            name = type(self._signal).__name__
            raise ConfigError(f"{name} looks at the first blocks and does not say so. Give it: needs_head = True")
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
        if self._first is None:
            raise self._blind()
        return modulated_input(*self._first)

    def taken(self) -> Tensor | None:
        if self._taken is None and self._signal is not None:
            taken = self._signal.take(self)
            if taken is not None:
                of_type(f"what {type(self._signal).__name__}.take gives", taken, Tensor, "a tensor, or None")
            self._taken = taken
        return self._taken

    def queue_schedule(self, changes: Changes) -> None:
        self._schedule(changes)

    def of_schedule(self, changes: Changes) -> float:
        return self._schedule(changes)[self._step] if self._branch.seen else float("inf")

    def _schedule(self, changes: Changes) -> HostCopy:
        """The changes at all steps of the run; made once, for all branches."""
        known, name = self._kept.schedules, self._model.name
        if name not in known:
            if self._first is None:
                raise self._blind()
            # The model embeds timesteps in the dtype of the hidden states, and so does the signal.
            like = next(v for v in (*self._first[1][0], *self._first[1][1].values()) if isinstance(v, Tensor))
            timesteps = torch.as_tensor(self._run.timesteps).to(like.device)
            known[name] = HostCopy(changes(unwrap(self._module), timesteps, like.dtype))
        return known[name]

    def _blind(self) -> UnsupportedModelError:
        return UnsupportedModelError(f"{type(self._module).__name__} has run no block: there is nothing to measure.")

"""The only code that intercepts a block: stands in front of a transformer and of its blocks."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn

from sgl_diffusion_accel.caching.blocks.cached_model import Branch, CachedModel
from sgl_diffusion_accel.caching.blocks.odd_models import full_call_argument, full_call_remark
from sgl_diffusion_accel.caching.blocks.transformer_call import TransformerCall
from sgl_diffusion_accel.caching.foreign import FORBIDDEN, refuse_late_cache
from sgl_diffusion_accel.caching.parts.policies import Decision
from sgl_diffusion_accel.intercept import Detour
from sgl_diffusion_accel.loop.runs import Run
from sgl_diffusion_accel.loop.session import Session
from sgl_diffusion_accel.patch import Patch, PatchHandler
from sgl_diffusion_accel.targets import branch_label, unwrap


class Controller(PatchHandler):
    """Caches one transformer: stands in front of it, and knows the call that is under way in this thread.

    Args:
        patch: The patch that it belongs to.
        model: The transformer under its cache.
        session: Shared by the transformers of the patch.
    """

    forbids_enable_cache = FORBIDDEN

    def __init__(self, patch: Patch, model: CachedModel, session: Session) -> None:
        self.patch = patch
        self._model = model
        self._session = session
        self._threads = threading.local()

    @property
    def current(self) -> TransformerCall | None:
        """The transformer call that is under way in this thread."""
        return getattr(self._threads, "current", None)

    def detour_past(self, list_index: int, index: int) -> Detour | None:
        """The short way past a block; None for one outside of its list's span, or its first one, which decides."""
        blocks = self._model.parts.layout.lists[list_index]
        inside, last = self._model.detours[list_index]
        if not blocks.start < index < blocks.end:
            return None
        return last if index == blocks.end - 1 else inside

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TransformerCall | None:
        """Begins a transformer call."""
        if self.current is not None:  # a wrapper (`targets.unwrap`) has entered this call already
            return None
        where = self._session.enter(unwrap(module), args, kwargs)
        if where is None:
            return None
        where = where[0], where[1], branch_label(self._model.name, where[2])
        if where[1] == 0:
            refuse_late_cache(module)
        argument = full_call_argument(kwargs)
        if argument is not None:
            self._model.log(*where, Decision(True, "arguments forbid skipping"))
            self._model.remarks.tell(where[0], full_call_remark(argument))
        else:
            self._threads.current = self._begin(module, *where, _latents(args, kwargs))
        return self.current

    def _begin(
        self, module: nn.Module, run: Run, step: int, branch: str, latents: torch.Size | None
    ) -> TransformerCall:
        kept = run.data.setdefault((self._model.name, branch), Branch())
        policy = self._model.policy(run, branch, kept, latents)
        return TransformerCall(self._model, module, run, step, branch, policy)

    def leave(self, _: nn.Module, token: TransformerCall | None, output: Any) -> Any:
        """Ends a transformer call: what it computed enters the history."""
        if token is not None:
            self._threads.current = None
            if not self.patch.is_in_place:
                token.cut_off()
                return output
            try:
                token.finish()
                self._observe(token, output)
            except BaseException:
                self._drop(token)
                raise
        return output

    def _observe(self, token: TransformerCall, output: Any) -> None:
        """Shows a call to those who record."""
        parts, at = self._model.parts, (token.run.data["number"], token.branch, token.step)
        if parts.observe is not None:
            parts.observe(*at, output)
        if parts.observe_residuals is not None and (residuals := token.hidden_residuals()):
            parts.observe_residuals(*at, residuals)

    def fail(self, _: nn.Module, token: TransformerCall | None) -> None:
        """Ends a transformer call that raised, and with it the run's memory."""
        if token is not None:
            self._threads.current = None
            self._drop(token)

    def _drop(self, token: TransformerCall) -> None:
        self._session.runs.discard(token.run)
        token.abandon()


class BlockHandler(PatchHandler):
    """Stands in front of one block."""

    def __init__(self, controller: Controller, list_index: int, index: int) -> None:
        self.patch = controller.patch
        self._controller = controller
        self._list = list_index
        self._index = index
        self.detour = controller.detour_past(list_index, index)

    def enter(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answers for a skipped block."""
        current = self._controller.current
        return None if current is None else current.before(self._list, self._index, block, (args, kwargs))

    def leave(self, _: nn.Module, token: TransformerCall | None, output: Any) -> Any:
        """Sees what a computed block returned."""
        if token is not None:
            token.after(self._list, self._index, output)
        return output

    def fail(self, _: nn.Module, token: TransformerCall | None) -> None:
        """Nothing: the transformer's own handler drops the run."""


def _latents(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Size | None:
    """Shape of the first tensor that a transformer is called with: its latents."""
    return next((value.shape for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)

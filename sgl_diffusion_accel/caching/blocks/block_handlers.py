"""The only code that intercepts a block: stands in front of a transformer and of its blocks."""

from __future__ import annotations

from typing import Any

from torch import nn

from sgl_diffusion_accel.caching.blocks.cached_model import CachedModel
from sgl_diffusion_accel.caching.blocks.transformer_call import TransformerCall
from sgl_diffusion_accel.caching.cache_handler import CacheHandler
from sgl_diffusion_accel.loop.session import Session, Where
from sgl_diffusion_accel.patch import Patch, PatchHandler
from sgl_diffusion_accel.slots import Detour


class BlockCacheHandler(CacheHandler[TransformerCall]):
    """Caches the blocks of one transformer: stands in front of it, and tells its blocks which call is under way.

    Args:
        patch: The patch that it belongs to.
        model: The transformer under its cache.
        session: Shared by the transformers of the patch.
    """

    def __init__(self, patch: Patch, model: CachedModel, session: Session) -> None:
        super().__init__(patch, model.name, session, model.log)
        self._model = model

    def _begin(self, module: nn.Module, where: Where) -> TransformerCall:
        return TransformerCall(self._model, module, where)

    def detour_past(self, list_index: int, index: int) -> Detour | None:
        """The short way past a block; None for one outside of its list's span, or its first one, which decides."""
        blocks = self._model.parts.layout.lists[list_index]
        inside, last = self._model.detours[list_index]
        if not blocks.start < index < blocks.end:
            return None
        return last if index == blocks.end - 1 else inside


class BlockHandler(PatchHandler):
    """Stands in front of one block."""

    def __init__(self, transformer: BlockCacheHandler, list_index: int, index: int) -> None:
        self.patch = transformer.patch
        self._transformer = transformer
        self._list = list_index
        self._index = index
        self.detour = transformer.detour_past(list_index, index)

    def enter(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answers for a skipped block."""
        current = self._transformer.current
        return None if current is None else current.before(self._list, self._index, block, (args, kwargs))

    def leave(self, _: nn.Module, token: TransformerCall | None, output: Any) -> Any:
        """Sees what a computed block returned."""
        if token is not None:
            token.after(self._list, self._index, output)
        return output

    def fail(self, _: nn.Module, token: TransformerCall | None) -> None:
        """Nothing: the transformer's own handler drops the run."""

"""Puts probes in front of a pipeline's parts, and takes them away again exactly."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from sgl_diffusion_accel.intercept import intercept, release
from sgl_diffusion_accel.profiling.recording.probes import Probe
from sgl_diffusion_accel.shadow import restore, shadow
from sgl_diffusion_accel.slots import CALL, slot_of

_KIND = "profile"
_COMPILED = "_compiled_call_impl"


class Attachments:
    """The probes of one profile."""

    def __init__(self) -> None:
        self._kind = f"{_KIND} {id(self):x}"  # two profiles may share a part, such as a scheduler
        self._undo: dict[tuple[int, str], tuple[Any, Callable[[], None]]] = {}

    def put(self, owner: Any, method: str, probe: Probe) -> tuple[int, str]:
        """Puts a probe in front of a method, or to the front again.

        What an instance holds as an attribute of its own is exchanged there: a method that was compiled, and the
        compiled call of a module, so that nothing has to be compiled once more for a module of another class.

        Returns:
            A key for `keep`.
        """
        key = (id(owner), method)
        attribute = _COMPILED if method == CALL and is_compiled(owner) and slot_of(owner) is None else method
        held = vars(owner).get(attribute)
        if held is None:
            intercept(owner, self._kind, probe, method)
            self._undo[key] = owner, partial(release, owner, self._kind, method)
        elif getattr(held, _KIND, None) is not self:
            vars(owner)[attribute] = put = shadow(owner, held, probe)
            vars(put)[_KIND] = self
            self._undo[key] = owner, partial(restore, owner, attribute, put, held)
        return key

    def keep(self, keys: set[tuple[int, str]]) -> None:
        """Takes away all probes but those of these keys."""
        for key in [key for key in self._undo if key not in keys]:
            self._undo.pop(key)[1]()

    def remove(self) -> None:
        """Takes all probes away, newest first. Harmless when repeated."""
        while self._undo:
            self._undo.popitem()[1][1]()


def is_compiled(module: Any) -> bool:
    """Whether `module.compile()` was called."""
    return isinstance(module, nn.Module) and getattr(module, _COMPILED, None) is not None


def is_profiled(owner: Any) -> bool:
    """Whether some profile has a probe in front of an object's call."""
    slot = slot_of(owner)
    kinds = slot.kinds if slot is not None else {}
    return any(kind.startswith(_KIND) for kind in kinds) or hasattr(vars(owner).get(_COMPILED), _KIND)

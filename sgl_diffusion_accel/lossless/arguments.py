"""The arguments of a transformer's calls by the names of its `forward`, wherever they stand in a call."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

_Call = tuple[tuple[Any, ...], dict[str, Any]]


class Arguments:
    """Finds and changes arguments by name.

    Args:
        forward: The method that takes them, `self` first.
    """

    def __init__(self, forward: Any) -> None:
        self.names = tuple(inspect.signature(forward).parameters)[1:]
        self._places = {name: place for place, name in enumerate(self.names)}

    def find(self, names: Iterable[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of these names that a call gives, by name."""
        found = {}
        for name in names:
            if name in kwargs:
                found[name] = kwargs[name]
            elif self._places[name] < len(args):
                found[name] = args[self._places[name]]
        return found

    def change(self, changed: Mapping[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
        """A call with other values of arguments that it gives."""
        by_place = list(args)
        by_name = dict(kwargs)
        for name, value in changed.items():
            if name in by_name:
                by_name[name] = value
            else:
                by_place[self._places[name]] = value
        return tuple(by_place), by_name

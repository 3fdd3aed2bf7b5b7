"""What belongs to the call of a component that is under way in a thread."""

from __future__ import annotations

import threading
from dataclasses import dataclass


@dataclass(frozen=True)
class Outer:
    """What held before a call began, to be put back when it ends."""

    is_on: bool
    seen: int
    is_inside: bool


class UnderWay(threading.local):
    """The call that is under way in this thread; each thread has its own.

    A `threading.local` and no context variable, since `torch.compile` can trace the one and not the other: it reads
    `is_on` while it traces, and guards on what the thread that calls has there.

    Attributes:
        is_on: Whether attention calls go to the backend. Outside of any call of the component they do.
        seen: Attention calls that have come to the redirect in this call, whoever computed them.
        is_inside: Whether a call is under way.
        is_scoped: Whether a `Scope` is entered: a second one inside of it would see what the first one has computed.
    """

    def __init__(self) -> None:
        self.is_on = True
        self.seen = 0
        self.is_inside = False
        self.is_scoped = False

    def begin(self, is_on: bool) -> Outer:
        """Begins a call. Returns what `end` has to be given."""
        outer = Outer(self.is_on, self.seen, self.is_inside)
        self.is_on, self.seen, self.is_inside = is_on, 0, True
        return outer

    def end(self, outer: Outer) -> int:
        """Ends a call, also one that raised, and returns how many attention calls it had."""
        seen = self.seen
        self.is_on, self.seen, self.is_inside = outer.is_on, outer.seen, outer.is_inside
        return seen

"""Stands in front of a function that an instance holds as an attribute of its own, which its class cannot intercept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sgl_diffusion_accel.slots import Handler, Instead


def shadow(owner: Any, held: Callable[..., Any], handler: Handler) -> Callable[..., Any]:
    """A function that runs another one inside a handler.

    Args:
        owner: What the handler is told it stands in front of.
        held: The function.
        handler: Stands in front of it; it may answer in the function's place (`Instead`).
    """

    def shadowed(*args: Any, **kwargs: Any) -> Any:
        token = handler.enter(owner, args, kwargs)
        if type(token) is Instead:
            return token.output
        try:
            output = held(*args, **kwargs)
        except BaseException:
            handler.fail(owner, token)
            raise
        return handler.leave(owner, token, output)

    return shadowed


def restore(owner: Any, attribute: str, put: object, held: object) -> None:
    """Puts back what an instance held, unless something else has been put there since."""
    if vars(owner).get(attribute) is put:
        vars(owner)[attribute] = held

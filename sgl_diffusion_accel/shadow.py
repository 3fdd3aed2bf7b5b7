"""Stands in front of a method of any instance: by its class, or of a function that the instance holds itself.

An attribute of the instance's own is in front of its class, which so cannot intercept it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sgl_diffusion_accel.intercept import intercept, release
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


def stand_before(owner: Any, method: str, kind: str, handler: Handler) -> Callable[[Any], None]:
    """Puts a handler in front of a method of an instance, whoever holds it.

    Args:
        owner: The instance.
        method: The name of the method.
        kind: Name of the handler; of a kind there is one at a time.
        handler: Stands in front of it.

    Returns:
        What takes it away again, called with the instance, which it need not keep alive.
    """
    held = vars(owner).get(method)
    if held is not None:  # somebody else has put it on this instance
        vars(owner)[method] = put = shadow(owner, held, handler)
        return lambda owner: restore(owner, method, put, held)
    intercept(owner, kind, handler, method)
    return lambda owner: release(owner, kind, method)

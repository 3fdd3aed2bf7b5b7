"""Branches of guidance that a loop names itself: `with branch("uncond"):` around a transformer call."""

from __future__ import annotations

from collections.abc import Iterator
from contextvars import ContextVar

from sgl_diffusion_accel.errors import ConfigError, ConfigTypeError
from sgl_diffusion_accel.frames import Place, entering

_JOINED = "+"
_BOTH = ("uncond+cond", "cond+uncond")


class NamedBranch:
    """A branch that is entered with `with`. Made by `branch`."""

    def __init__(self, name: str) -> None:
        self.name = name
        # A stack: the same object may be entered again before it is left.
        self._places: list[Place] = []

    @property
    def place(self) -> Place:
        """The frame that has entered it."""
        return self._places[-1]

    def __enter__(self) -> NamedBranch:
        self._places.append(entering())
        _branches.set((*_branches.get(), self))
        return self

    def __exit__(self, *_: object) -> None:
        # Not by a token: a generator may be closed in another context than it was begun in.
        self._places.pop()
        entered = list(_branches.get())
        if self in entered:
            del entered[len(entered) - 1 - entered[::-1].index(self)]
            _branches.set(tuple(entered))


_branches: ContextVar[tuple[NamedBranch, ...]] = ContextVar("branch", default=())


def branch(name: str, *others: str) -> NamedBranch:
    """Tells which branch of a denoising step the transformer calls inside a `with` belong to.

    What a cache keeps of one branch never reaches another. In a loop by `denoising_steps` a call without a name is
    `"cond"`, and further ones in the same step are told apart by what they are given and by their order; with a name
    nothing is left to that. The names `"cond"` and `"uncond"` are those that guidance combines. It also names the calls
    of a pipeline's own method, where it is entered in that method, and counts less there than a `cache_context` that is
    entered inside of it.

    Args:
        name: Any name; the same one at every step.
        *others: Of a call that holds both branches in one batch, the second one: `branch("uncond", "cond")` has the
            unconditional half first. Needed only where no step of the loop's `scheduler` shows how they are combined.

    Returns:
        A context manager.

    Raises:
        ConfigError: A name is empty, or several are other than `"cond"` and `"uncond"`. Raised by the transformer
            call: two names, and a batch that cannot be halved.
        ConfigTypeError: One is no string.

    Example:
        >>> with branch("uncond"):
        ...     noise = pipe.transformer(latents, t, no_text).sample
    """
    given: tuple[object, ...] = (name, *others)
    names = []
    for each in given:
        if not isinstance(each, str):
            kind = type(each).__name__
            raise ConfigTypeError(f"the name of a branch is a {kind}; allowed: a string, such as 'cond'.")
        if not each.strip():
            raise ConfigError("the name of a branch is empty; allowed: any other, such as 'cond' or 'uncond'.")
        names.append(each.strip())
    joined = _JOINED.join(names)
    if len(names) > 1 and joined not in _BOTH:
        raise ConfigError(
            f"several names of branches in one batch are {', '.join(map(repr, names))}; allowed: 'uncond' and 'cond', "
            "in the order in which the batch holds them. Type: branch('uncond', 'cond')"
        )
    return NamedBranch(joined)


def refuse_uneven(branch: str, samples: int) -> None:
    """Raises ConfigError for a call that is said to hold two branches, and whose batch cannot be halved.

    Args:
        branch: The name that the call has.
        samples: In its batch.
    """
    if branch in _BOTH and samples % 2:
        first, second = branch.split(_JOINED)
        raise ConfigError(
            f"a call inside of branch({first!r}, {second!r}) has a batch of {samples}, which does not hold two "
            f"branches of one length. Type, for a call of one branch: branch({second!r})"
        )


def branches_entered() -> Iterator[NamedBranch]:
    """The branches that this context is in, innermost first."""
    return reversed(_branches.get())

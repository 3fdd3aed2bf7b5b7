"""What is compared: the unpatched pipeline, the user's variants, and simply fewer steps."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from sgl_diffusion_accel.caching.foreign import has_foreign_cache
from sgl_diffusion_accel.calls import Call
from sgl_diffusion_accel.errors import ConfigError, ConfigTypeError, VariantError
from sgl_diffusion_accel.patch import remove
from sgl_diffusion_accel.targets import find_targets

UNPATCHED = "unpatched"
_TAKEN = re.compile(rf"{UNPATCHED}|\d+ steps?|\d+% of the steps")

Variant = Callable[[Any], Any]


@dataclass(frozen=True)
class Contender:
    """One way to run a pipeline.

    Attributes:
        name: Its name in the report.
        apply: The user's function that patches the pipeline; None leaves it unpatched.
        steps: For fewer steps: of each call, by its index.
    """

    name: str
    apply: Variant | None = None
    steps: tuple[int, ...] | None = None


def read_variants(variants: Any) -> list[Contender]:
    """Checks the user's variants.

    Raises:
        ConfigTypeError: They are no dict of functions.
        ConfigError: A name is empty or taken.
    """
    if not isinstance(variants, Mapping):
        raise ConfigTypeError(
            f"variants is a {type(variants).__name__}; allowed: a dict of names to functions that patch a pipeline, "
            'such as {"cache": lambda pipe: apply_cache_dit(pipe)}.'
        )
    for name, apply in variants.items():
        if not isinstance(name, str) or not name.strip() or _TAKEN.fullmatch(name):
            raise ConfigError(
                f"variants has the name {name!r}; allowed: any text but {UNPATCHED!r} and, for rows with fewer steps, "
                "'25 steps' and the like."
            )
        if not callable(apply):
            raise ConfigTypeError(
                f"variant {name!r} is a {type(apply).__name__}; allowed: a function that takes the pipeline and "
                "patches it, such as lambda pipe: apply_cache_dit(pipe). It is called before each of its runs."
            )
    return [Contender(name, apply) for name, apply in variants.items()]


@contextmanager
def applied(pipe: Any, contender: Contender) -> Iterator[None]:
    """Patches the pipeline as a variant says, and undoes everything at the end, also on an error.

    Raises:
        VariantError: The variant raised, within the context or at its end, or has left something on the pipeline.
    """
    if contender.apply is None:
        yield
        return
    components = dict(pipe.components)
    try:
        with ExitStack() as stack:
            stack.callback(remove, pipe)
            for part in _managers(contender, contender.apply(pipe), pipe):
                stack.enter_context(part)
            yield
    except VariantError:
        raise
    except Exception as error:
        raise VariantError(f"variant {contender.name!r} failed: {type(error).__name__}: {error}") from error
    _check_left_as_found(pipe, contender.name, components)


def _managers(contender: Contender, returned: Any, pipe: Any) -> list[Any]:
    parts = returned if isinstance(returned, (list, tuple)) else [returned]
    found = [part for part in parts if part is not None and part is not pipe]
    for part in found:
        if not (hasattr(part, "__enter__") and hasattr(part, "__exit__")):
            raise VariantError(
                f"variant {contender.name!r} returned a {type(part).__name__}; allowed: what apply_cache_dit and the "
                "others return, a list of them, any context manager, or None."
            )
    return found


def _check_left_as_found(pipe: Any, name: str, components: Mapping[str, Any]) -> None:
    """What a variant does without this library it must undo by itself, else all later runs are not what they seem."""
    now = pipe.components
    changed = [key for key in {*components, *now} if components.get(key) is not now.get(key)]
    if changed:
        raise VariantError(
            f"variant {name!r} left another {' and '.join(sorted(changed))} on the pipeline. Put it back at the end: "
            "write the variant as a context manager (contextlib.contextmanager)."
        )
    for target in find_targets(pipe):
        if has_foreign_cache(target.module):
            raise VariantError(
                f"variant {name!r} left one of diffusers' own caches on pipe.{target.name}. Take it off at the end: "
                f"write the variant as a context manager that calls pipe.{target.name}.disable_cache()."
            )


def check_fewer_steps(fewer_steps: Any, calls: Sequence[Call]) -> None:
    """Checks the user's wish for rows with fewer steps.

    Raises:
        ConfigTypeError: It is neither a bool nor a list of numbers.
        ConfigError: A number of steps is impossible.
    """
    if isinstance(fewer_steps, bool):
        return
    if isinstance(fewer_steps, str) or not isinstance(fewer_steps, Sequence):
        raise ConfigTypeError(
            f"fewer_steps is a {type(fewer_steps).__name__}; allowed: True (as many as the variants cost), False, or a "
            "list of step counts such as [25, 15]."
        )
    if any(call.steps is None for call in calls):
        raise ConfigError(
            "fewer_steps has step counts, and the steps of a call are not set by num_inference_steps alone. Give "
            "num_inference_steps in each call, without timesteps and sigmas; or fewer_steps=False."
        )
    most = min(call.steps for call in calls if call.steps is not None)
    wrong = [steps for steps in fewer_steps if type(steps) is not int or not 0 < steps < most]
    if wrong:
        raise ConfigError(f"fewer_steps has {wrong[0]!r}; allowed: 1 to {most - 1}, fewer than the calls have.")


def fewer_steps_contenders(
    fewer_steps: bool | Sequence[int], calls: Sequence[Call], shares: Mapping[str, float | None]
) -> list[Contender]:
    """Unpatched runs with fewer steps: as many as given, or as many as each variant costs.

    Args:
        fewer_steps: As the user has given it.
        calls: All calls.
        shares: Variant to the share of the blocks that it computes.
    """
    totals = [call.steps for call in calls if call.steps is not None]
    if fewer_steps is False or len(totals) < len(calls):
        return []
    if fewer_steps is True:
        wanted = [
            tuple(max(1, round(total * share)) for total in totals)
            for share in sorted(filter(None, shares.values()), reverse=True)
        ]
        wanted = [steps for steps in wanted if any(n < total for n, total in zip(steps, totals, strict=True))]
    else:
        wanted = [(steps,) * len(calls) for steps in fewer_steps]
    found = {steps: Contender(_fewer_name(steps, totals), None, steps) for steps in wanted}
    return list(found.values())


def _fewer_name(steps: Sequence[int], totals: Sequence[int]) -> str:
    if len(set(steps)) == 1:
        return f"{steps[0]} step{'' if steps[0] == 1 else 's'}"
    return f"{sum(steps) / sum(totals):.0%} of the steps"

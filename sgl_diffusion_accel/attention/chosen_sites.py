"""Which attention layers of a component get another backend."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

from sgl_diffusion_accel.attention.sites import Site, find_scopes, find_sites
from sgl_diffusion_accel.errors import ConfigError, ConfigTypeError, UnsupportedModelError
from sgl_diffusion_accel.targets import Target


def strings(name: str, given: object) -> list[str]:
    """A string or several, as a list."""
    found = [given] if isinstance(given, str) else given
    if not isinstance(found, Sequence) or not all(isinstance(each, str) for each in found):
        raise ConfigTypeError(f"{name}={given!r}; allowed: a name, or a list of names.")
    if not found:
        raise ConfigError(f"{name} is empty: give at least one name, or leave it out for the default.")
    return list(found)


def chosen_sites(target: Target, layers: str | Sequence[str] | None) -> list[Site]:
    """The layers to be redirected; none for a module without processors."""
    component, module = target.name, target.module
    found = list(find_sites(module))
    if not found and not find_scopes(module):
        raise UnsupportedModelError(
            f"{component} ({type(module).__name__}) computes no attention by PyTorch's function for it: no "
            "backend can be set there. Leave it out."
        )
    if layers is not None:
        patterns = strings("layers", layers)
        chosen = [site for site in found if any(_matches(site.name, pattern) for pattern in patterns)]
        for pattern in patterns:
            if not any(_matches(site.name, pattern) for site in found):
                raise ConfigError(
                    f"layers={pattern!r} names no attention layer of {component}. There are "
                    f"{_some([site.name for site in found])}."
                )
        found = chosen
    unable = [site for site in found if not site.can_redirect]
    if unable:
        able = [site.name for site in found if site.can_redirect]
        hint = (
            f"The others can be set: layers=[...], of {_some(able)}." if able else "No attention backend applies to it."
        )
        raise UnsupportedModelError(
            f"{len(unable)} of {len(found)} attention layers of {component} ({type(module).__name__}), such as "
            f"{unable[0].name}, cannot have another backend: {unable[0].why_not}. {hint}"
        )
    return found


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:4])
    return f"{shown}, … ({len(names)})" if len(names) > 4 else shown or "none"

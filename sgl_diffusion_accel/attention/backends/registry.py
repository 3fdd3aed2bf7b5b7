"""Attention backends by name, and those that are added to the table."""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Callable
from typing import Any

from sgl_diffusion_accel.attention.backends.backend_table import NOT_OFFERED, TABLE, Backend
from sgl_diffusion_accel.attention.backends.packages import installed_version
from sgl_diffusion_accel.attention.backends.requirements import Requirements
from sgl_diffusion_accel.errors import ConfigError, ConfigTypeError, unknown_name
from sgl_diffusion_accel.validate import names_checked

_BEST_FLASH = ("flash4", "flash3", "flash", "sdpa_flash")

_registered: dict[str, Backend] = {}


def all_backends() -> dict[str, Backend]:
    """Name to backend: the table, and what has been registered."""
    return {each.name: each for each in TABLE} | _registered


def fingerprint(backend: Backend) -> str:
    """What tells one release of a backend from another: the package's version, or the code of a registered function."""
    if backend.package is not None:
        return str(installed_version(backend.package))
    if backend.name not in _registered:
        return ""
    try:
        function: Any = backend.load()
        code = function.__code__
        cells = [cell.cell_contents for cell in function.__closure__ or ()]
    except Exception:  # it has no code to look at, or is found not to work where the error can be told
        return ""
    parts = (code.co_code, code.co_names, code.co_consts, function.__defaults__, function.__kwdefaults__, cells)
    return f"{zlib.crc32(repr(parts).encode()):08x}"


def find_backend(name: str) -> Backend:
    """Finds a backend by any of its names.

    Raises:
        ConfigError: The name is unknown, with the nearest known one; or known and not offered, with the reason.
    """
    if not isinstance(name, str):
        raise ConfigTypeError(f"a backend is named by a string, not by a {type(name).__name__}.")
    known = all_backends()
    low = name.strip().lower()
    if low == "fa":
        return next(each for each in flash_family() if each.lacks() is None)
    for backend in known.values():
        if low == backend.name.lower() or low in backend.aliases:
            return backend
    if low in NOT_OFFERED:
        raise ConfigError(f"attention backend {name!r} is not offered: {NOT_OFFERED[low]}.")
    names = {*known, "fa", "auto", *(alias for backend in known.values() for alias in backend.aliases)}
    raise unknown_name("attention backend", name, names)


def flash_family() -> list[Backend]:
    """What SGLang-Diffusion's `fa` may be, the newest first; the last one comes with PyTorch."""
    known = all_backends()
    return [known[name] for name in _BEST_FLASH]


_OWN = {"mask", "is_causal", "scale", "enable_gqa"}


@names_checked
def register_attention_backend(
    name: str, function: Callable[..., Any], *, is_exact: bool = True, **requirements: Any
) -> None:
    """Adds an attention function of one's own to the table, for this process.

    Args:
        name: The name under which it can be set; registering a name of one's own again replaces it.
        function: `function(query, key, value, *, mask, is_causal, scale, enable_gqa)`, with query `[B, H, Q, D]`, key
            and value `[B, Hkv, K, D]`; returns `[B, H, Q, D]`.
        is_exact: Whether it computes in the precision of its inputs.
        **requirements: What it can take, by the names of `Requirements`: `devices`, `dtypes`, `head_sizes`,
            `masks=False`, `causal=False`, `gqa=False`, ….

    Raises:
        ConfigError: The name is taken, or a requirement is unknown.
        ConfigTypeError: `function` cannot be called like that.

    Example:
        >>> def mine(query, key, value, *, mask, is_causal, scale, enable_gqa):
        ...     return torch.softmax(query @ key.mT * (scale or query.shape[-1] ** -0.5), -1) @ value
        >>> register_attention_backend("mine", mine, masks=False, causal=False, gqa=False)
    """
    taken = {each for backend in TABLE for each in (backend.name, *backend.aliases)} | {"auto", "fa", *NOT_OFFERED}
    given: object = name
    if not isinstance(given, str) or not name.strip():
        raise ConfigTypeError(f"name={name!r}; allowed: a string.")
    if name.strip().lower() in taken:
        raise ConfigError(f"the name {name!r} belongs to a backend of the library. Take another one.")
    if not callable(function):
        raise ConfigTypeError(f"function is a {type(function).__name__}; allowed: a function of query, key and value.")
    try:
        inspect.signature(function).bind(None, None, None, **dict.fromkeys(_OWN))
    except TypeError as error:
        raise ConfigTypeError(
            f"{name}: the function cannot be called as function(query, key, value, *, mask, is_causal, scale, "
            f"enable_gqa): {error}."
        ) from None
    except ValueError:  # built-in functions have no signature to look at
        pass
    for each in requirements:
        if each not in Requirements.__dataclass_fields__:
            raise unknown_name("requirement", each, Requirements.__dataclass_fields__, "register_attention_backend")
    kernel: Any = function
    for other in [each for each in _registered if each.lower() == name.strip().lower()]:
        del _registered[other]
    _registered[name.strip()] = Backend(
        name.strip(), lambda: kernel, is_exact=is_exact, requirements=Requirements(**requirements)
    )

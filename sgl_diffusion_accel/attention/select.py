"""`set_attention_backend`: the front door, and the table of what can be used."""

from __future__ import annotations

import fnmatch
import logging
import numbers
from collections.abc import Mapping, Sequence

from torch import nn

from sgl_diffusion_accel.attention.attention_handlers import Steps
from sgl_diffusion_accel.attention.attention_patch import KIND, AttentionPatch
from sgl_diffusion_accel.attention.backends.backend_table import Backend
from sgl_diffusion_accel.attention.backends.registry import all_backends, find_backend, flash_family
from sgl_diffusion_accel.attention.measured_choice import MeasuredChoice, default_store
from sgl_diffusion_accel.attention.redirect import OnUnsupported, Redirect
from sgl_diffusion_accel.attention.sites import Site, find_scopes, find_sites
from sgl_diffusion_accel.attention.usable import BackendStatus, BackendTable, model_facts, usable, why_not
from sgl_diffusion_accel.attention.verify import check_output
from sgl_diffusion_accel.errors import (
    ConfigError,
    ConfigTypeError,
    MissingPackageError,
    UnsupportedModelError,
    unknown_name,
)
from sgl_diffusion_accel.patch import patches_of
from sgl_diffusion_accel.targets import find_transformers, refuse_data_parallel, unwrap

logger = logging.getLogger(__name__)

AUTO = "auto"


def set_attention_backend(
    pipe: object,
    backend: str | Mapping[str, str],
    components: str | Sequence[str] | None = None,
    *,
    layers: str | Sequence[str] | None = None,
    skip_first_steps: int = 0,
    skip_last_steps: int = 0,
    on_unsupported: OnUnsupported = "error",
    verify: bool | None = None,
    allow_quantised: bool = False,
) -> AttentionPatch:
    """Computes the attention of a pipeline with another backend: this pipeline's alone, checked, and undone exactly.

    Args:
        pipe: A diffusers pipeline, or a transformer by itself.
        backend: A name of `attention_backends(pipe)`, or any that SGLang-Diffusion or diffusers have for it; `"auto"`
            to time all usable ones on the calls that really come and take the fastest; or a mapping from component to
            name. Further transformers (`transformer_2`, `unconditional_transformer`) are set with `transformer` unless
            they are named.
        components: Which components a single name is for; None for the transformers.
        layers: Names of attention layers, or patterns such as `"blocks.*.attn1"`; None for all.
        skip_first_steps: Denoising steps at the start of a run that keep the model's own attention.
        skip_last_steps: The same at its end.
        on_unsupported: What happens to calls that the backend cannot take, such as cross-attention with a mask:
            `"error"`, or `"native"` to leave them to the model's own attention, counted in `patch.fallbacks`.
        verify: Compares first calls with a float32 reference, and raises where they are wrong. True: the first of each
            layer, with each shape and mask. False: none. None: of quantised backends the first of each kind of call
            (shapes, type, mask or none), since they can be far off at some shapes; of exact ones none. Each time it
            costs a part of one attention call in float32, and waits for the device. Calls in compiled code cannot be
            compared: run once uncompiled for that.
        allow_quantised: Whether `"auto"` may pick backends that compute in fewer bits.

    Returns:
        The patch: `patch.remove()` undoes it exactly, `print(patch)` tells what ran where.

    Raises:
        ConfigError: A name or setting is unknown or not allowed.
        ConfigTypeError: `pipe` or a setting has a wrong type.
        MissingPackageError: The backend's package is missing or too old.
        UnsupportedModelError: The device, the head size or the model does not go with the backend. Later, at a call:
            what only then is known, such as a mask, or that its output is wrong.

    Example:
        >>> patch = set_attention_backend(pipe, "math")
        >>> video = pipe(**call)
        >>> patch.remove()
    """
    switches = {"allow_quantised": allow_quantised} | ({} if verify is None else {"verify": verify})
    _check(on_unsupported, skip_first_steps, skip_last_steps, switches)
    plans: dict[str, tuple[nn.Module, Redirect, str]] = {}
    choices: dict[str, MeasuredChoice] = {}
    for component, (module, name) in _named(pipe, backend, components).items():
        sites = _sites(component, unwrap(module), layers)
        if name == AUTO:
            choices[component] = MeasuredChoice(allow_quantised, default_store())
            redirect = Redirect(component, None, on_unsupported, check_output if verify else None, choices[component])
        else:
            found = _resolve(name, pipe, unwrap(module), sites)
            _check_backend(found, component, unwrap(module), sites, pipe)
            redirect = _loaded(found, component, on_unsupported, verify)
        plans[component] = (module, redirect, AUTO if redirect.backend is None else redirect.backend.name)
    patch = AttentionPatch()
    steps = Steps(int(skip_first_steps), int(skip_last_steps))
    modules = {component: unwrap(module) for component, (module, *_) in plans.items()}
    _tell_of_replaced(modules)
    with patch.applying(pipe, modules.values()):
        for component, (module, redirect, name) in plans.items():
            sites = _sites(component, unwrap(module), layers)  # as they are without the patch that was replaced
            patch.attach(component, module, sites, redirect, name, steps, choices.get(component))
    return patch


def _resolve(name: str, pipe: object, module: nn.Module, sites: Sequence[Site]) -> Backend:
    """The backend of a name; `"fa"` is the newest FlashAttention that the model goes with."""
    found = find_backend(name)
    if name != "fa":
        return found
    fitting = (each for each in flash_family() if why_not(each, pipe, module, sites) is None)
    return next((each for each in fitting if _can_load(each)), found)


def _can_load(backend: Backend) -> bool:
    try:
        backend.load()
    except Exception:  # made for another CUDA, or half installed: the next one is tried
        logger.info("attention backend %s cannot be loaded", backend.name, exc_info=True)
        return False
    return True


def _loaded(backend: Backend, component: str, on_unsupported: OnUnsupported, verify: bool | None) -> Redirect:
    check = check_output if verify or (verify is None and not backend.is_exact) else None
    try:
        return Redirect(component, backend, on_unsupported, check, by_layer=verify is True)
    except Exception as error:
        raise MissingPackageError(
            f"attention backend {backend.name!r} cannot be loaded: {type(error).__name__}: {error}"
        ) from error


def _check(on_unsupported: object, first: object, last: object, switches: Mapping[str, object]) -> None:
    if on_unsupported not in ("error", "native"):
        raise unknown_name("value of on_unsupported", str(on_unsupported), ("error", "native"))
    for name, value in (("skip_first_steps", first), ("skip_last_steps", last)):
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise ConfigTypeError(f"{name}={value!r} is a {type(value).__name__}; allowed: a whole number from 0.")
        if int(value) < 0:
            raise ConfigError(f"{name}={value}; allowed: a whole number from 0.")
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise ConfigTypeError(f"{name}={value!r}: allowed are True and False.")


def _named(
    pipe: object, backend: str | Mapping[str, str], components: str | Sequence[str] | None
) -> dict[str, tuple[nn.Module, str]]:
    """Component to its module and the name of its backend."""
    known = _components(pipe)
    if isinstance(backend, Mapping):
        if components is not None:
            raise ConfigError("components= goes with a single name; a mapping names its components itself.")
        wanted = dict(backend)
        if not wanted:
            raise ConfigError("backend is an empty mapping. Type: {'transformer': 'sdpa'}, or a single name.")
    elif isinstance(backend, str):
        names = list(find_transformers(pipe)) if components is None else _strings("components", components)
        wanted = dict.fromkeys(names, backend)
    else:
        raise ConfigTypeError(
            f"backend is a {type(backend).__name__}; allowed: a name such as 'sdpa', or a dict of component to name."
        )
    for name in wanted:
        if name not in known:
            raise unknown_name("component", str(name), known, type(pipe).__name__)
        refuse_data_parallel(name, known[name])
    if "transformer" in wanted:
        wanted = dict.fromkeys(find_transformers(pipe), wanted["transformer"]) | wanted
    for name in wanted.values():
        if not isinstance(name, str):
            raise ConfigTypeError(f"a backend is named by a string, not by a {type(name).__name__}.")
    return {component: (known[component], name.strip().lower()) for component, name in wanted.items()}


def _strings(name: str, given: object) -> list[str]:
    """A string or several, as a list."""
    found = [given] if isinstance(given, str) else given
    if not isinstance(found, Sequence) or not all(isinstance(each, str) for each in found):
        raise ConfigTypeError(f"{name}={given!r}; allowed: a name, or a list of names.")
    if not found:
        raise ConfigError(f"{name} is empty: give at least one name, or leave it out for the default.")
    return list(found)


def _components(pipe: object) -> dict[str, nn.Module]:
    if isinstance(pipe, nn.Module):
        return {"transformer": pipe}
    components = getattr(pipe, "components", None)
    if not isinstance(components, dict):
        raise ConfigTypeError(
            f"expected a diffusers pipeline or its transformer, got {type(pipe).__name__}. "
            "Type: set_attention_backend(pipe, 'sdpa')."
        )
    return {name: part for name, part in components.items() if isinstance(part, nn.Module)}


def _sites(component: str, module: nn.Module, layers: str | Sequence[str] | None) -> list[Site]:
    """The layers to be redirected; none for a module without processors."""
    found = list(find_sites(module))
    if not found and not find_scopes(module):
        raise UnsupportedModelError(
            f"{component} ({type(module).__name__}) computes no attention by PyTorch's function for it: no "
            "backend can be set there. Leave it out."
        )
    if layers is not None:
        patterns = _strings("layers", layers)
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


def _check_backend(backend: Backend, component: str, module: nn.Module, sites: Sequence[Site], pipe: object) -> None:
    """Raises where the packages, the device or the model do not go with a backend."""
    lacks = backend.lacks()
    if lacks is not None:
        raise MissingPackageError(
            f"attention backend {backend.name!r} cannot be used: {lacks}. Usable here: "
            f"{', '.join(usable(pipe, module, sites))}."
        )
    for facts in model_facts(pipe, module, sites, backend):
        reason = backend.requirements.refuses(facts)
        if reason is not None:
            raise UnsupportedModelError(
                f"attention backend {backend.name!r} does not go with {component} ({type(module).__name__}): {reason}. "
                f"Usable here: {', '.join(usable(pipe, module, sites))}."
            )


def _tell_of_replaced(modules: Mapping[str, nn.Module]) -> None:
    """Warns where what an earlier call has set is on other components, too."""
    patches = [patch for module in modules.values() for patch in patches_of(module) if patch.kind == KIND]
    for old in dict.fromkeys(patches):
        if isinstance(old, AttentionPatch) and not old.is_open and set(old.backends) - set(modules):
            logger.warning(
                "the attention backend that is replaced was also on %s: it is gone there.",
                " and ".join(sorted(set(old.backends) - set(modules))),
            )


def attention_backends(pipe: object, component: str = "transformer") -> BackendTable:
    """Tells which attention backends a pipeline can use on this machine, and why not the others.

    Args:
        pipe: A diffusers pipeline, or a transformer by itself.
        component: Which of its components.

    Returns:
        One row for each backend; `print` shows them as a table.

    Raises:
        ConfigError: There is no such component.
        ConfigTypeError: `pipe` is no pipeline.

    Example:
        >>> [each.name for each in attention_backends(pipe) if each.is_usable][:2]
        ['sdpa', 'math']
    """
    known = _components(pipe)
    if component not in known:
        raise unknown_name("component", component, known, type(pipe).__name__)
    module = unwrap(known[component])
    sites = [site for site in find_sites(module) if site.can_redirect]
    nowhere = None if sites or find_scopes(module) else f"{component} computes no attention that could be redirected"
    rows = []
    for backend in all_backends().values():
        reason = nowhere or why_not(backend, pipe, module, sites)
        rows.append(
            BackendStatus(
                backend.name,
                backend.aliases,
                reason is None,
                reason or "",
                backend.is_exact,
                backend.requirements.masks,
                backend.install,
            )
        )
    return BackendTable(rows)

"""`set_attention_backend`: the front door, and the table of what can be used."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence

from sgl_diffusion_accel.attention.attention_config import AttentionConfig
from sgl_diffusion_accel.attention.attention_handlers import Steps
from sgl_diffusion_accel.attention.attention_patch import KIND, AttentionPatch
from sgl_diffusion_accel.attention.backends.backend_table import Backend
from sgl_diffusion_accel.attention.backends.registry import all_backends, find_backend, flash_family
from sgl_diffusion_accel.attention.chosen_sites import chosen_sites, strings
from sgl_diffusion_accel.attention.measured_choice import MeasuredChoice, default_store
from sgl_diffusion_accel.attention.redirect import OnUnsupported, Redirect
from sgl_diffusion_accel.attention.sites import Site, find_scopes, find_sites
from sgl_diffusion_accel.attention.usable import BackendStatus, BackendTable, model_facts, usable, why_not
from sgl_diffusion_accel.attention.verify import check_output
from sgl_diffusion_accel.errors import ConfigError, ConfigTypeError, MissingPackageError, UnsupportedModelError
from sgl_diffusion_accel.patch import patches_of
from sgl_diffusion_accel.targets import Pipe, Target, Targets, components_of, find_targets, refuse_data_parallel, unwrap
from sgl_diffusion_accel.validate import check_names, names_checked

logger = logging.getLogger(__name__)

AUTO = "auto"


@names_checked
def set_attention_backend(
    pipe: Pipe,
    backend: str | Mapping[str, str] | AttentionConfig,
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
            to time all usable ones on the calls that really come and take the fastest; a mapping from component to
            name; or the `config` of another such patch, alone. Further transformers (`transformer_2`,
            `unconditional_transformer`) are set with `transformer` unless they are named.
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
    if isinstance(backend, AttentionConfig):
        return _as_configured(
            pipe,
            backend,
            AttentionConfig(
                "sdpa", components, layers, skip_first_steps, skip_last_steps, on_unsupported, verify, allow_quantised
            ),
        )
    config = AttentionConfig(
        backend, components, layers, skip_first_steps, skip_last_steps, on_unsupported, verify, allow_quantised
    )
    plans = []
    for target, name in _named(pipe, backend, components):
        sites = chosen_sites(target, layers)
        choice = MeasuredChoice(config.allow_quantised, default_store()) if name == AUTO else None
        if choice is not None:
            check = check_output if verify else None
            redirect = Redirect(target.name, None, config.on_unsupported, check, choice)
        else:
            found = _resolve(name, pipe, target, sites)
            _check_backend(found, target, sites, pipe)
            redirect = _loaded(found, target.name, config)
        plans.append((target, redirect, choice))
    patch = AttentionPatch(config)
    steps = Steps(config.skip_first_steps, config.skip_last_steps)
    targets = Targets(pipe, [target for target, *_ in plans])
    _tell_of_replaced(targets)
    with patch.applying(targets):
        for target, redirect, choice in plans:
            sites = chosen_sites(target, layers)  # as they are without the patch that was replaced
            name = AUTO if redirect.backend is None else redirect.backend.name
            patch.attach(target, sites, redirect, name, steps, choice)
    return patch


def _as_configured(pipe: Pipe, config: AttentionConfig, beside: AttentionConfig) -> AttentionPatch:
    """Sets what a config says; anything else that was given beside it would be silently dropped."""
    if beside != AttentionConfig("sdpa"):
        raise ConfigError(
            "a config holds all settings: give none beside it. Type: set_attention_backend(pipe, "
            "dataclasses.replace(config, layers=...))"
        )
    return set_attention_backend(pipe, **{each.name: getattr(config, each.name) for each in dataclasses.fields(config)})


def _resolve(name: str, pipe: object, target: Target, sites: Sequence[Site]) -> Backend:
    """The backend of a name; `"fa"` is the newest FlashAttention that the model goes with."""
    found = find_backend(name)
    if name != "fa":
        return found
    fitting = (each for each in flash_family() if why_not(each, pipe, target.module, sites) is None)
    return next((each for each in fitting if _can_load(each)), found)


def _can_load(backend: Backend) -> bool:
    try:
        backend.load()
    except Exception:  # made for another CUDA, or half installed: the next one is tried
        logger.info("attention backend %s cannot be loaded", backend.name, exc_info=True)
        return False
    return True


def _loaded(backend: Backend, component: str, config: AttentionConfig) -> Redirect:
    verify = config.verify
    check = check_output if verify or (verify is None and not backend.is_exact) else None
    try:
        return Redirect(component, backend, config.on_unsupported, check, by_layer=verify is True)
    except Exception as error:
        raise MissingPackageError(
            f"attention backend {backend.name!r} cannot be loaded: {type(error).__name__}: {error}"
        ) from error


def _named(
    pipe: object, backend: str | Mapping[str, str], components: str | Sequence[str] | None
) -> list[tuple[Target, str]]:
    """The components, each with the name of its backend."""
    known = components_of(pipe)
    if isinstance(backend, Mapping):
        if components is not None:
            raise ConfigError("components= goes with a single name; a mapping names its components itself.")
        wanted = dict(backend)
        if not wanted:
            raise ConfigError("backend is an empty mapping. Type: {'transformer': 'sdpa'}, or a single name.")
    elif isinstance(backend, str):
        chosen = find_targets(pipe).names if components is None else strings("components", components)
        wanted = dict.fromkeys(chosen, backend)
    else:
        raise ConfigTypeError(
            f"backend is a {type(backend).__name__}; allowed: a name such as 'sdpa', or a dict of component to name."
        )
    check_names("component", list(map(str, wanted)), list(known), type(pipe).__name__)
    for name in wanted:
        refuse_data_parallel(name, known[name])
    if "transformer" in wanted:
        wanted = dict.fromkeys(find_targets(pipe).names, wanted["transformer"]) | wanted
    for name in wanted.values():
        if not isinstance(name, str):
            raise ConfigTypeError(f"a backend is named by a string, not by a {type(name).__name__}.")
    return [(Target.of(component, known[component]), name.strip().lower()) for component, name in wanted.items()]


def _check_backend(backend: Backend, target: Target, sites: Sequence[Site], pipe: object) -> None:
    """Raises where the packages, the device or the model do not go with a backend."""
    lacks = backend.lacks()
    if lacks is not None:
        raise MissingPackageError(
            f"attention backend {backend.name!r} cannot be used: {lacks}. Usable here: "
            f"{', '.join(usable(pipe, target.module, sites))}."
        )
    for facts in model_facts(pipe, target.module, sites, backend):
        reason = backend.requirements.refuses(facts)
        if reason is not None:
            raise UnsupportedModelError(
                f"attention backend {backend.name!r} does not go with {target.name} ({type(target.module).__name__}): "
                f"{reason}. Usable here: {', '.join(usable(pipe, target.module, sites))}."
            )


def _tell_of_replaced(targets: Sequence[Target]) -> None:
    """Warns where what an earlier call has set is on other components, too."""
    names = {target.name for target in targets}
    patches = [patch for target in targets for patch in patches_of(target.module) if patch.kind == KIND]
    for old in dict.fromkeys(patches):
        if isinstance(old, AttentionPatch) and not old.is_open and set(old.backends) - names:
            logger.warning(
                "the attention backend that is replaced was also on %s: it is gone there.",
                " and ".join(sorted(set(old.backends) - names)),
            )


@names_checked
def attention_backends(pipe: Pipe, component: str = "transformer") -> BackendTable:
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
    known = components_of(pipe)
    check_names("component", [component], list(known), type(pipe).__name__)
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
